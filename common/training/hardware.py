"""What the devices can do at most, and how much of their memory is taken."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from common.training.compiling import program_kind
from common.training.pod import flops
from common.training.pod.places import RATES
from common.training.pod.topologies import GIB

# By the beginning of its kind's name, of several that fit the longest: the name in `places`.
_KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device kind, None where they are not known, as of CPUs."""
    fitting = [name for name in _KINDS if kind.startswith(name)]
    return RATES[_KINDS[max(fitting, key=len)]].tflops * 1e12 if fitting else None


def device_memory(mesh: Mesh) -> dict[str, float]:
    """GiB that the fullest of this process's devices has had in use; {} where that is unknown."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return {"device_memory_gib": max(peaks) / GIB} if peaks else {}


def step_flops(step: Callable, mesh: Mesh) -> Callable[[Any, Mapping[str, Any]], float]:
    """Makes `(state, batch) -> FLOPs of one device`, counted once for each program.

    Without a known peak nobody asks, and nothing is counted: 0.

    Args:
      step: jitted `(state, batch) -> ...`.
      mesh: all devices.
    """
    if peak_flops(mesh.devices.flat[0].device_kind) is None:
        return lambda state, batch: 0.0
    platform = mesh.devices.flat[0].platform
    platform = {"gpu": "cuda"}.get(platform, platform)  # as `jax.lax.platform_dependent` names it
    known: dict[tuple[Any, ...], float] = {}

    def count(state: Any, batch: Mapping[str, Any]) -> float:
        kind = program_kind(batch)
        if kind not in known:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
            known[kind] = float(flops.count(step, *shapes, platform=platform))
        return known[kind]

    return count
