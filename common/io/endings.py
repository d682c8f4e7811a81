"""Who is to hear of the error that ends a command, before Python's own clean-up."""

import contextlib
from collections.abc import Callable, Iterator

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
