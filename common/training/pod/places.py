"""Accelerators by the names that clouds give them: how many there are, and what one can do."""

import dataclasses
import re

from common.io.errors import UserError

MAX_SLICE = {"v5e": 256, "v6e": 256}  # chips; a larger name means several slices


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device of a kind can do. A device of v2 and v3 is a core, half a chip.

    Attributes:
      tflops: peak in bfloat16, without sparsity.
      gib: of its memory.
      memory: GB/s of it.
      unit: side of the matrix unit.
      links: GB/s to its neighbours, all links together, both ways.
      per_host: devices of a host.
      network: GB/s of a host to hosts of other slices, or between GPU hosts.
      per_chip: devices of a chip, by which clouds count and charge.
    """

    tflops: float
    gib: float
    memory: float
    unit: int
    links: float
    per_host: int
    network: float
    per_chip: int = 1


# Of the vendors' public tables.
RATES = {
    "v2": Rates(22.5, 8, 350, 128, 124, 8, 12.5, 2),
    "v3": Rates(61.5, 16, 450, 128, 164, 8, 12.5, 2),
    "v4": Rates(275, 32, 1228, 128, 300, 4, 25),
    "v5e": Rates(197, 16, 819, 128, 200, 4, 25),
    "v5p": Rates(459, 95, 2765, 128, 600, 4, 25),
    "v6e": Rates(918, 32, 1640, 256, 448, 4, 50),
    "a100": Rates(312, 80, 2039, 64, 600, 8, 100),
    "h100": Rates(989, 80, 3350, 64, 900, 8, 200),
    "h200": Rates(989, 141, 4800, 64, 900, 8, 200),
}
_COUNTS_CORES = ("v2", "v3", "v4", "v5p")  # in their names, which have two of them a chip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is planned: `count` devices of a kind in each of `slices` slices."""

    kind: str
    count: int
    slices: int

    @property
    def rates(self) -> Rates:
        return RATES[self.kind]

    @property
    def is_gpu(self) -> bool:
        return self.kind[0] != "v"

    @property
    def devices(self) -> int:
        return self.count * self.slices

    @property
    def chips(self) -> int:
        return self.devices // self.rates.per_chip

    @property
    def hosts(self) -> int:
        return max(self.devices // self.rates.per_host, self.slices)


def find_place(name: str) -> Place:
    """The place of a name such as v3-512, v6e-256x2 (slices) or h100-8x4 (hosts of GPUs).

    Raises:
      UserError: no such name.
    """
    match = re.fullmatch(r"([a-z]+\d+[a-z]*)-(\d+)(?:x(\d+))?", name)
    kind, size = (match[1], int(match[2])) if match else ("", 0)
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    if kind not in RATES or size < 1:
        raise UserError(
            f"--slice: found {name!r}, expected KIND-SIZE[xSLICES], KIND one of {', '.join(RATES)}"
        )
    rates = RATES[kind]
    # A name counts two cores a chip where the kind does; a device is a core or a chip.
    chips = size // 2 if kind in _COUNTS_CORES else size
    slices = int((match and match[3]) or 1)
    if chips > (largest := MAX_SLICE.get(kind, chips)):
        chips, slices = largest, slices * chips // largest
    return Place(kind, max(chips * rates.per_chip, 1), slices)
