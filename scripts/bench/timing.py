"""Timing of two or more programs side by side."""

import time
from collections.abc import Callable, Sequence

import numpy as np


def time_in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[np.ndarray]:
    """Returns the seconds of each call, (repeats,) per callable.

    The callables take turns, so that whatever else the machine does meets all of them alike. Each
    must have run before (compilation, caches) and must block until its result is there.
    """
    seconds = [np.zeros(repeats) for _ in calls]
    for repeat in range(repeats):
        for call, slots in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            slots[repeat] = time.perf_counter() - start
    return seconds
