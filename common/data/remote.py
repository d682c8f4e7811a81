"""Reads of files behind addresses such as gs://, repeated where the storage is only busy."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from common.data.workers.sinks import Tally

Result = TypeVar("Result")

_TRIES = 6
_FIRST_WAIT = 0.5  # seconds, doubled each time: half a minute in all

repeated = Tally()  # of all reads of this process and its workers


def patiently(
    read: Callable[[], Result],
    path: str,
    transient: tuple[type[Exception], ...],
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """The result of `read`, which is called again, later and later, while it raises `transient`.

    Args:
      read: reads a file.
      path: of it, for messages.
      transient: what passes by itself; the last of it is raised.
      sleep: waits for some seconds.
    """
    for attempt in range(_TRIES - 1):
        try:
            return read()
        except transient as error:
            reason = " ".join(str(error).split())[:200]
            repeated.add(1, f"{path}: read again, the storage says {reason}")
            # Not in step with the other readers, whose number may be what keeps it busy.
            sleep(_FIRST_WAIT * 2**attempt * (0.5 + random.random()))
    return read()
