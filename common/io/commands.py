"""Entry point shared by all command-line tools."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from common.io.errors import UserError
from common.io.home import expand_home_in_flags
from common.io.memory import keep_freed_memory

# Before anything imports TensorFlow, which would report its build options at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def run_main(main: Callable[..., int | None], actions: Sequence[str] = ()) -> None:
    """Runs a command under absl; a `UserError` becomes one line on stderr and exit status 1.

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
            expand_home_in_flags()
            return main(*check_arguments(argv[1:], actions))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1

    app.run(guarded)


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
