"""Entry point shared by all command-line tools."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from common.io.command_line import parse_flags
from common.io.endings import EXIT_AGAIN, errors_told, say_error, try_to_say
from common.io.errors import Stopped, UserError
from common.io.home import expand_home_in_flags
from common.io.memory import keep_freed_memory


def run_main(main: Callable[..., int | None], actions: Sequence[str] = ()) -> None:
    """Runs a command under absl; what a user can mend becomes one line and exit status 1.

    That is a `UserError` here or in the command line, and what the operating system refuses. Help
    and wrong flags are answered before the imports of the command, see `common.io.early_answers`.

    A command that was told to end (`Stopped`) and that the same command goes on with exits with 75.

    Args:
      main: the command. It is called without arguments, or with the chosen one of `actions`.
      actions: the command line must name one of these beside its flags. Without actions a command
        takes flags only, and any other argument is refused.
    """
    keep_freed_memory()
    # absl would show every INFO line of the libraries, which bury the command's own.
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.set_default("verbosity", logging.WARNING)

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            with errors_told():
                expand_home_in_flags()
                return main(*check_arguments(argv[1:], actions))
        except Stopped as stopped:
            try_to_say(f"stopped by {stopped}: the same command goes on from here", sys.stdout)
            return EXIT_AGAIN
        except (UserError, OSError, RecursionError, MemoryError) as error:
            return _refuse(error)
        except KeyboardInterrupt:
            return _interrupted()

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return parse_flags(argv)
        except UserError as error:
            sys.exit(_refuse(error))
        except KeyboardInterrupt:  # while it waited for a config
            sys.exit(_interrupted())

    app.run(guarded, flags_parser=parse)


def _interrupted() -> int:
    try_to_say("interrupted")
    return 128 + signal.SIGINT


def _refuse(error: BaseException) -> int:
    """Says the error in one line; returns the exit status."""
    if isinstance(error, BrokenPipeError):  # `command | head`: nobody reads what is said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    say_error(one_line(error))
    return 1


def one_line(error: BaseException) -> str:
    """What an error says to a user, in one line."""
    if isinstance(error, MemoryError):
        return "out of memory" + (f" ({error})" if str(error) else "")
    if isinstance(error, RecursionError):
        return "an input is nested too deeply to be read"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno or errno.EIO)}"
    return " ".join(str(error).split()) or type(error).__name__


def check_arguments(arguments: Sequence[str], actions: Sequence[str] = ()) -> Sequence[str]:
    """The arguments of a command line that are no flags: none, or one of `actions`.

    Raises:
      UserError: anything else.
    """
    if actions and (len(arguments) != 1 or arguments[0] not in actions):
        shown = " ".join(arguments) or "none"
        raise UserError(f"argument: found {shown}, expected one of {', '.join(actions)}")
    if arguments and not actions:
        raise UserError(f"unexpected argument {arguments[0]!r}, expected flags only")
    return arguments
