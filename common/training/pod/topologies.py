"""TPU slices by name, and what an ahead-of-time compiled program needs on each of their devices.

No TPU is needed: the compiler comes with the `libtpu` package. It runs in one process at a
time (several with ALLOW_MULTIPLE_LIBTPU_LOAD=1), and `JAX_PLATFORMS=cpu` must be set before JAX
starts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from common.io.errors import UserError
from common.training.pod.places import Place

GIB = 1024**3


# What the topology description of the kinds whose chips are one device takes.
_MEGACORE = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}


def topology(place: Place) -> tuple[str, dict[str, Any]]:
    """The name that the compiler has for a slice, such as "v3:16x16", and its options.

    Raises:
      UserError: chips that make no slice.
    """
    chips = place.count // place.rates.per_chip
    sides = _sides(chips, 3 if place.kind in ("v4", "v5p") else 2)
    if place.is_gpu or math.prod(sides) != chips:
        raise UserError(
            f"--slice: found {place.kind} with {chips} chips, expected TPUs, by powers of two from "
            "4 chips; others have a roofline only (--nocompile)"
        )
    options: dict[str, Any] = {}
    if len(sides) == 3:
        options |= _MEGACORE
        if all(side % 4 == 0 for side in sides):  # whole cubes are joined to a torus
            options["wrap"] = (True, True, True)
    if place.slices > 1:
        options["num_slices"] = place.slices
    return f"{place.kind}:{'x'.join(map(str, sides))}", options


def _sides(chips: int, dimensions: int) -> tuple[int, ...]:
    """Sides of a slice, ascending: powers of two as equal as can be."""
    if dimensions == 3 and chips == 4:
        return 2, 2, 1
    power = chips.bit_length() - 1
    return tuple(2 ** ((power + place) // dimensions) for place in range(dimensions))


def slice_devices(place: Place) -> list[jax.Device]:
    """The devices of a slice, none of them real.

    Raises:
      UserError: no such slice, or the TPU compiler is not installed.
    """
    name, options = topology(place)
    try:
        return get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"the TPU compiler does not start ({str(error).splitlines()[0]}); expected the "
            "package libtpu (pip install libtpu) and no other process that uses it; without it "
            "there is a roofline only (--nocompile)"
        ) from error


_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+?\d+)\[([\d,]*)\]")
_ASKED = re.compile(
    r"stablehlo\.(?P<kind>all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter|"
    r"collective_broadcast)\b.*? -> (?P<shapes>[^\n]*)",
    re.DOTALL,
)
_TENSOR = re.compile(r"tensor<([\dx]*?)x?([a-z]+\d+)>")
_HLO_NAMES = {"i1": "pred", "i8": "s8", "i32": "s32", "i64": "s64", "ui8": "u8", "ui32": "u32"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of traffic between devices; `bytes` is the size of the results on one device."""

    kind: str
    dtype: str
    count: int
    bytes: int
    largest: str


def hlo_text(compiled: jax.stages.Compiled) -> str | None:
    """What the compiler made; None where this jaxlib cannot read it.

    That is so for v5p and v6e with jaxlib 0.10.2 and libtpu 0.0.52.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def collectives(hlo: str) -> list[Collective]:
    """All traffic between devices in a compiled program's text, by kind and element type."""
    return _summed(
        (match["kind"], dtype, dims)
        for match in _COLLECTIVE.finditer(hlo)
        for dtype, dims in _SHAPE.findall(match["shapes"])
    )


def asked_collectives(stablehlo: str) -> list[Collective]:
    """The traffic that a program asks for, before the compiler joins or adds any."""
    return _summed(
        (match["kind"].replace("_", "-"), _HLO_NAMES.get(dtype, dtype), dims.replace("x", ","))
        for match in _ASKED.finditer(stablehlo)
        for dims, dtype in _TENSOR.findall(match["shapes"])
    )


def _summed(found: Iterable[tuple[str, str, str]]) -> list[Collective]:
    """(kind, element type, sides) of each array."""
    arrays = collections.defaultdict(list)
    for kind, dtype, dims in found:
        size = math.prod(int(d) for d in dims.split(",") if d)
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype.removeprefix("b")) or 8)
        arrays[kind, dtype].append((size * bits // 8, f"{dtype}[{dims}]"))
    return [
        Collective(kind, dtype, len(items), sum(b for b, _ in items), max(items)[1])
        for (kind, dtype), items in sorted(arrays.items())
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
