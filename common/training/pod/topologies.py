"""TPU slices by name, and what an ahead-of-time compiled program needs on each of their devices.

No TPU is needed: the compiler comes with the `libtpu` package. It runs in one process at a
time (several with ALLOW_MULTIPLE_LIBTPU_LOAD=1), and `JAX_PLATFORMS=cpu` must be set before JAX
starts.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from common.io.errors import UserError

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several equal TPU slices.

    Attributes:
      topology: name that the compiler knows, such as "v3:16x16".
      hbm_gib: memory of one device (v2 and v3: a core; later: a chip).
      tflops: peak of one device in bfloat16.
      options: further arguments of the topology description.
      num_slices: slices joined over the data-centre network.
    """

    topology: str
    hbm_gib: float
    tflops: float
    options: tuple[tuple[str, Any], ...] = ()
    num_slices: int = 1


_MEGACORE = (("chip_config_name", "megacore"), ("chips_per_host_bounds", (2, 2, 1)))
_TORUS = (*_MEGACORE, ("wrap", (True, True, True)))

# Names as Cloud TPU sells them: v2 to v5p count cores, v5e and v6e count chips.
SLICES = {
    "v2-8": Slice("v2:2x2", 8, 22.5),
    "v2-512": Slice("v2:16x16", 8, 22.5),
    "v3-8": Slice("v3:2x2", 16, 61.5),
    "v3-32": Slice("v3:4x4", 16, 61.5),
    "v3-128": Slice("v3:8x8", 16, 61.5),
    "v3-512": Slice("v3:16x16", 16, 61.5),
    "v4-8": Slice("v4:2x2x1", 32, 275, _MEGACORE),
    "v4-128": Slice("v4:4x4x4", 32, 275, _TORUS),
    "v4-1024": Slice("v4:8x8x8", 32, 275, _TORUS),
    "v5p-128": Slice("v5p:4x4x4", 95, 459, _TORUS),
    "v5p-1024": Slice("v5p:8x8x8", 95, 459, _TORUS),
    "v5e-256": Slice("v5e:16x16", 16, 197),
    "v5e-512": Slice("v5e:16x16", 16, 197, num_slices=2),
    "v6e-256": Slice("v6e:16x16", 32, 918),
    "v6e-512": Slice("v6e:16x16", 32, 918, num_slices=2),
}


def slice_devices(name: str) -> tuple[Slice, list[jax.Device]]:
    """The slice called `name` (or whose topology is `name`) and its devices, none of them real.

    Raises:
      UserError: unknown name, or the TPU compiler is not installed.
    """
    by_topology = {s.topology: s for s in SLICES.values() if s.num_slices == 1}
    found = SLICES.get(name) or by_topology.get(name)
    if found is None:
        raise UserError(f"--slice: found {name!r}, expected one of {', '.join(SLICES)}")
    options = dict(found.options)
    if found.num_slices > 1:
        options["num_slices"] = found.num_slices
    try:
        topology = get_topology_desc(platform="tpu", topology_name=found.topology, **options)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"the TPU compiler does not start ({str(error).splitlines()[0]}); expected the "
            "package libtpu (pip install libtpu) and no other process that uses it"
        ) from error
    return found, topology.devices


_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+?\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of traffic between devices; `bytes` is the size of the results on one device."""

    kind: str
    dtype: str
    count: int
    bytes: int
    largest: str


def traffic(compiled: jax.stages.Compiled) -> list[Collective] | None:
    """All traffic between devices; None where this jaxlib cannot read what the compiler made.

    That is so for v6e with jaxlib 0.10.2 and libtpu 0.0.51.
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return None if text is None else collectives(text)


def collectives(hlo: str) -> list[Collective]:
    """All traffic between devices in a compiled program's text, by kind and element type."""
    found = collections.defaultdict(list)
    for match in _COLLECTIVE.finditer(hlo):
        for dtype, dims in _SHAPE.findall(match["shapes"]):
            size = math.prod(int(d) for d in dims.split(",") if d)
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype.removeprefix("b")) or 8)
            found[match["kind"], dtype].append((size * bits // 8, f"{dtype}[{dims}]"))
    return [
        Collective(kind, dtype, len(items), sum(b for b, _ in items), max(items)[1])
        for (kind, dtype), items in sorted(found.items())
    ]


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device: arguments, temporaries, outputs that are not donated, and their sum."""
    analysis = compiled.memory_analysis()
    assert analysis is not None, "TPU programs have one"
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": outputs,
        "code": analysis.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}
