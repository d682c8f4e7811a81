"""A run that is told to end, by its cloud or by Ctrl-C, stops at a point that all processes share.

SIGTERM or SIGINT at any process asks for it. Every process passes the same points in the same
order, one after each step and each batch of an evaluation; those that have heard of a request
agree on the next point that none has passed yet, and all stop there. A second SIGINT ends the
process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from common.io.endings import say_error, try_to_say
from common.io.errors import Stopped
from common.training.team import Store, Team

_Item = TypeVar("_Item")
_LOOK_SECONDS = 0.05  # from one look at the others' counts to the next
_STOPS = (signal.SIGTERM, signal.SIGINT)


class StopPoints:
    """Counts the points that this process passes, and knows at which to stop."""

    def __init__(
        self,
        store: Store | None = None,
        index: int = 0,
        count: int = 1,
        ended: threading.Event | None = None,
    ):
        """A process that is alone needs no arguments.

        Args:
          store: shared by the processes.
          index: of this process.
          count: of all processes.
          ended: set when the run ends because of a failure, or that of a process that is gone.
        """
        self._store, self._index, self._count = store, index, count
        self._ended = ended or threading.Event()
        self._passed = 0
        self._stop_at: int | None = None
        self._asked = ""  # why, by a signal of this process
        self._reason = ""
        self._lock = threading.Lock()

    def ask(self, reason: str) -> None:
        """Asks for a stop; processes hear of it by `agree`."""
        self._asked = self._asked or reason
        if self._store is None:
            self._reason, self._stop_at = self._asked, 0

    def passes(self) -> None:
        """Called by every process at each point.

        Raises:
          Stopped: this is where all stop.
        """
        with self._lock:
            self._passed += 1
            if self._stop_at is not None and self._passed >= self._stop_at:
                raise Stopped(self._reason)

    def passes_alone(self) -> None:
        """Called where this process depends on no other one.

        Raises:
          Stopped: anybody has asked, and no point is shared: in a training, the next one is.
        """
        if self._reason and (self._store is None or not self._passed):
            raise Stopped(self._reason)

    def agree(self) -> None:
        """Looks for requests, and agrees with all others where to stop. Call it every second.

        Nobody passes a point between telling its count and knowing those of all others. That wait
        has no end of its own: a process answers whatever its main thread does, and one that is gone
        ends the run. So all find the same counts.
        """
        if self._store is None or self._stop_at is not None:
            return
        if self._asked:
            self._store.key_value_set(
                f"stop/asked/{self._index}", self._asked, allow_overwrite=True
            )
        asked = self._store.key_value_dir_get("stop/asked/")
        if not asked:
            return
        self._reason = asked[0][1]
        with self._lock:
            while self._stop_at is None and not self._ended.wait(_LOOK_SECONDS):
                with contextlib.suppress(RuntimeError):  # the network failed, or process 0
                    self._stop_at = self._agreed()

    def _agreed(self) -> int | None:
        """Tells how many points this process has passed; where all stop, once all have told it."""
        assert self._store is not None
        counts = self._store.key_value_dir_get("stop/passed/")
        passed = {int(key.rsplit("/", 1)[1]): int(value) for key, value in counts}
        if self._index not in passed:
            key = f"stop/passed/{self._index}"
            self._store.key_value_set(key, str(self._passed), allow_overwrite=True)
        return max(passed.values()) + 1 if len(passed) == self._count else None


_points = StopPoints()
_installed = False


def install(team: Team | None, host: str) -> None:
    """Takes SIGTERM and SIGINT for requests from now on. Call it in the main thread."""
    global _points, _installed
    if _installed:
        return
    _installed = True
    if team is not None:
        _points = StopPoints(team.store, team.index, team.count, team.ended)
        team.every_second(_points.agree, "stop points")
        host = team.name(team.index)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A thread reads the signals: the main one may be in a collective that never returns.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _STOPS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_hear, args=(reader, host), name="signals", daemon=True).start()


def _hear(reader: int, host: str) -> None:
    interrupted = False
    while number := os.read(reader, 1):
        if number[0] not in _STOPS:  # one that asks for a trace, see common.training.profiling
            continue
        name = signal.Signals(number[0]).name
        if number[0] == signal.SIGINT and interrupted:
            say_error("interrupted twice, nothing saved")
            os._exit(130)
        interrupted |= number[0] == signal.SIGINT
        again = "; once more: at once" if interrupted else ""
        _points.ask(f"{name} at {host}")
        try_to_say(f"{name}: stops after this step{again}")


def passes() -> None:
    """A point at which the run may be stopped; every process passes the same ones.

    Raises:
      Stopped: it is.
    """
    _points.passes()


def stoppable(items: Iterable[_Item], *, together: bool = True) -> Iterator[_Item]:
    """Yields the items, with a point after each.

    `together`: there are as many of them in every process; otherwise each stops for itself.
    """
    for item in items:
        yield item
        if together:
            _points.passes()
        else:
            _points.passes_alone()


@contextlib.contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Calls `save` when the block is stopped."""
    try:
        yield
    except Stopped:
        save()
        raise
