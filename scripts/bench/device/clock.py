"""Times calls that an accelerator works off in its own time."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from scripts.bench.device.sizes import Sizes
from scripts.bench.timing import time_in_turns


class Side(NamedTuple):
    """What is timed: `call` hands work to the device, `wait` blocks until a result is there."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]


class Time(NamedTuple):
    """Seconds of one call."""

    median: float
    least: float
    most: float

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"{name}_ms": 1e3 * self.median,
            f"{name}_least_ms": 1e3 * self.least,
            f"{name}_most_ms": 1e3 * self.most,
        }


def time_sides(sides: Mapping[str, Side], size: Sizes) -> dict[str, Time]:
    """Times the sides in turns, after calls that warm each of them up.

    A turn makes so many calls, and waits for the last, that all turns take about `size.seconds`.
    """
    turns = [_turn(side, size) for side in sides.values()]
    taken = time_in_turns([turn for turn, _ in turns], size.repeats)
    return {
        name: Time(*(float(f(t) / calls) for f in (np.median, np.min, np.max)))
        for name, t, (_, calls) in zip(sides, taken, turns, strict=True)
    }


def _turn(side: Side, size: Sizes) -> tuple[Callable[[], None], int]:
    for _ in range(1 if size.dry else 2):
        start = time.perf_counter()
        side.wait(side.call())
        once = time.perf_counter() - start
    calls = max(1, min(200, round(size.seconds / size.repeats / once)))

    def turn() -> None:
        for _ in range(calls):
            result = side.call()
        side.wait(result)

    return turn, calls
