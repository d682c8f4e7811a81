"""What a conversion dropped or repaired, by reason, with the first examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.io.errors import UserError

DROPPED = "dropped"
REPAIRED = "repaired"
NOTED = "noted"  # kept as it is; a strict report lets it pass
EXAMPLES = 20  # of each reason that the report keeps


class Report:
    """Counts dropped and repaired rows; a strict report refuses the first of them.

    Args:
      strict: raise a `UserError` naming file and row instead of counting.
    """

    def __init__(self, strict: bool = False):
        self._strict = strict
        self._entries: dict[str, dict[str, Any]] = {}

    def add(
        self,
        reason: str,
        action: str,
        files: Sequence[str] | str,
        rows: Sequence[Any] | np.ndarray,
        found: Sequence[str] = (),
    ) -> None:
        """Counts `len(rows)` rows.

        Args:
          reason: short and fixed, such as 'zero area'.
          action: DROPPED, REPAIRED or NOTED.
          files: file of each row, or one for all.
          rows: line numbers, annotation ids or image ids.
          found: what was found in the first EXAMPLES of `rows`.

        Raises:
          UserError: there is a row to drop or repair and the report is strict.
        """
        if not len(rows):
            return
        entry = self._entries.setdefault(
            reason, {"reason": reason, "action": action, "count": 0, "examples": []}
        )
        entry["count"] += len(rows)
        for i in range(min(len(rows), EXAMPLES - len(entry["examples"]))):
            row = rows[i].item() if isinstance(rows[i], np.generic) else rows[i]
            example = {"file": files if isinstance(files, str) else files[i], "row": row}
            if found:
                example["found"] = found[i]
            entry["examples"].append(example)
        if self._strict and action != NOTED:
            first = entry["examples"][0]
            text = f" ({first['found']})" if "found" in first else ""
            raise UserError(
                f"{first['file']}, row {first['row']}: {reason}{text}; --strict refuses it"
            )

    def count(self, reason: str) -> int:
        """How often a reason occurred."""
        return self._entries[reason]["count"] if reason in self._entries else 0

    def most_frequent(self) -> str:
        """What happened to most rows, for an error where nothing is left."""
        if not self._entries:
            return "nothing was dropped"
        entry = self.as_json()[0]
        first = entry["examples"][0]
        return f"{entry['count']:,} x {entry['reason']}, first {first['file']}, row {first['row']}"

    def as_json(self) -> list[dict[str, Any]]:
        """Entries, most frequent first."""
        return sorted(self._entries.values(), key=lambda entry: -entry["count"])

    def summary(self) -> str:
        """A few lines for the screen."""
        if not self._entries:
            return "nothing dropped, nothing repaired"
        lines = []
        for entry in self.as_json():
            first = entry["examples"][0]
            lines.append(
                f"{entry['action']:>8} {entry['count']:>10,}  {entry['reason']}"
                f"  (first: {first['file']}, row {first['row']})"
            )
        return "\n".join(lines)
