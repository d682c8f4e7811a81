"""How a command ends: its last words, and who hears of its error before Python's own clean-up."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from common.io.errors import Stopped

EXIT_AGAIN = 75  # EX_TEMPFAIL: start the same command again

_hearers: list[Callable[[BaseException], None]] = []


def on_error(hear: Callable[[BaseException], None]) -> None:
    """Has `hear` called with the error that ends the command."""
    _hearers.append(hear)


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Tells the error that ends the block, if it is one: `Stopped` and an exit with 0 are not."""
    try:
        yield
    except BaseException as error:
        well = isinstance(error, Stopped) or (isinstance(error, SystemExit) and not error.code)
        for hear in () if well else _hearers:
            hear(error)
        raise


def say_error(text: str) -> None:
    """Says what ends the command, as `try_to_say`."""
    try_to_say(f"error: {text}")


def try_to_say(text: str, file: TextIO | None = None) -> None:
    """Prints a line (default: to stderr) after what stdout still holds, where it can be written.

    A log on a full disk must not keep a command from ending and from telling the others why.
    """
    file = file or sys.stderr
    flush_or_drop(sys.stdout)
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file)
    flush_or_drop(file)


def flush_or_drop(stream: TextIO) -> None:
    """Writes what a stream holds; where that is impossible it is dropped, and all that follows.

    Otherwise Python would try once more at its end, fail, and exit with a status of its own.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
