"""Entry point shared by all command-line tools."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from common.io.errors import UserError
from common.io.memory import keep_freed_memory

# Before anything imports TensorFlow, which would report its build options at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a `UserError` becomes one line on stderr and exit status 1."""
    keep_freed_memory()
    # absl would show every INFO line of the libraries, which bury the command's own.
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.set_default("verbosity", logging.WARNING)

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1

    app.run(guarded)
