"""Entry point shared by all command-line tools."""

import sys
from collections.abc import Callable, Sequence

from absl import app

from common.errors import UserError
from common.memory import keep_freed_memory


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a `UserError` becomes one line on stderr and exit status 1."""
    keep_freed_memory()

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1

    app.run(guarded)
