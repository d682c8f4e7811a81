"""What counts and tells stays in the process of the run; workers take notes of what to tell it."""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

Note = tuple[int, str, tuple[Any, ...]]  # which sink, its method, its arguments


class Sink:
    """Base of objects that a loader tells something, and that give no answer.

    Loaders in worker processes get a `Recorder` in their place; the calls are made in the process
    of the run, so that counts, messages printed once, and errors are those of a single process.
    """


class Tally(Sink):
    """Counts what happens to photos, and names the first.

    Attributes:
      count: so far.
    """

    def __init__(self):
        self.count = 0
        self._lock = threading.Lock()

    def add(self, count: int, text: str) -> None:
        """`text`: what is said of the photo, if it is the first."""
        with self._lock:
            first = self.count == 0
            self.count += count
        if first:
            print(f"{text}; further ones are counted, not printed", file=sys.stderr, flush=True)


class Recorder:
    """Takes notes of the calls of a method of any name, for the thread that makes them."""

    def __init__(self, number: int):
        self._number = number

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: _notes().append((self._number, name, arguments))


_THREAD = threading.local()


def _notes() -> list[Note]:
    if not hasattr(_THREAD, "notes"):
        _THREAD.notes = []
    return _THREAD.notes


def take_notes() -> list[Note]:
    """The notes of this thread since the last call."""
    notes = _notes()
    _THREAD.notes = []
    return notes


def replay(notes: Sequence[Note], sinks: Sequence[Sink]) -> None:
    """Makes the calls; raises what the first of them raises that fails."""
    for number, method, arguments in notes:
        getattr(sinks[number], method)(*arguments)
