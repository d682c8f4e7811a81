"""What becomes of photos, and masks, that cannot be read."""

import sys
import threading

from common.data.workers.sinks import Sink
from common.io.errors import UserError

_MIN_TRIED = 100  # images before the share of unreadable ones is judged


class PhotoErrors(Sink):
    """What becomes of photos that cannot be read: `data.on_image_error`. Threads may share it.

    Attributes:
      skipped: how often one was left out.
    """

    def __init__(self, on_image_error: str, *, tolerant: bool = False):
        """`tolerant`: also where most of them cannot be read, the others are wanted."""
        self.skipped = 0
        self._fatal = on_image_error == "fatal"
        self._tolerant = tolerant
        self._tried = 0
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def count(self) -> None:
        """Counts a photo, readable or not."""
        with self._lock:
            self._tried += 1

    def skip(self, path: str, error: UserError, what: str = "image") -> None:
        """Counts an unreadable photo (or `what` belongs to it) and names it once.

        Raises:
          UserError: the config says 'fatal', or most photos so far cannot be read.
        """
        if self._fatal:
            raise UserError(
                f"{path}: cannot read the {what}: {error} "
                f"(data.on_image_error='skip' goes on without such {what}s)"
            ) from error
        with self._lock:
            self.skipped += 1
            first = path not in self._told
            self._told.add(path)
            skipped, tried = self.skipped, self._tried
        if first:
            print(f"{path}: skipped, cannot read the {what}: {error}", file=sys.stderr, flush=True)
        if tried >= _MIN_TRIED and skipped > tried // 2 and not self._tolerant:
            raise UserError(
                f"{path}: cannot read the {what}: {error}; {skipped} of {tried} {what}s could not "
                f"be read: is the dataset's {what}_root their folder?"
            ) from error
