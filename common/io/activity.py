"""What this process is doing, for those who watch it: the other processes of a run, the watchdog.

Loops that report to `common.io.progress.Progress` say so by it.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

INPUT = "waiting for input"
SCORING = "scoring"
COMPILING = "compiling"
CHECKPOINT = "saving a checkpoint"
EVALUATION = "evaluating"
PAUSE = "waiting for something to do"
PATIENT = (SCORING, PAUSE)  # may take as long as it likes


@dataclasses.dataclass(frozen=True)
class Activity:
    """A moment in the life of a process.

    Attributes:
      done: steps or batches that were finished, of all loops so far.
      step: of the training, or batch of the evaluation, that was finished last.
      what: it is doing now, such as `INPUT`; "" in a step.
      data_wait_share: of the time, lately.
    """

    done: int = 0
    step: int = 0
    what: str = ""
    data_wait_share: float = 0.0


_lock = threading.Lock()
_now = Activity()
_since = time.monotonic()
_spent: dict[str, float] = {}
_hearers: list[Callable[[], None]] = []


def current() -> tuple[Activity, float]:
    """What is done now, and the seconds since a step, or anything else that is done, ended."""
    with _lock:
        return _now, time.monotonic() - _since


def step_done(step: float) -> None:
    """Says that a step or batch was finished."""
    global _now
    with _lock:
        _now = dataclasses.replace(_now, done=_now.done + 1, step=int(step))
    _progress()


@contextlib.contextmanager
def heard(hear: Callable[[], None]) -> Iterator[None]:
    """Has `hear` called whenever a step, or anything else that is done, has ended."""
    _hearers.append(hear)
    try:
        yield
    finally:
        _hearers.remove(hear)


def _progress() -> None:
    global _since
    with _lock:
        _since = time.monotonic()
    for hear in tuple(_hearers):
        hear()


def data_wait(share: float) -> None:
    """Says what share of the time goes into waiting for input."""
    global _now
    with _lock:
        _now = dataclasses.replace(_now, data_wait_share=share)


def spent() -> dict[str, float]:
    """Seconds of this process by what was done; what is done within another one counts as that."""
    with _lock:
        return dict(_spent)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what is done in the block."""
    global _now
    with _lock:
        before, _now = _now.what, dataclasses.replace(_now, what=what)
    start = time.monotonic()
    try:
        yield
    finally:
        with _lock:
            _now = dataclasses.replace(_now, what=before)
            if not before:
                _spent[what] = _spent.get(what, 0.0) + time.monotonic() - start
        _progress()
