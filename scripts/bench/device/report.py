"""What a worker tells the command that started it: events, one JSON object a line of a file.

plan   cases: names in the order of their turns
start  case, limit: seconds it may take
line   case, name, and figures; also printed
error  case, text
end    case
"""

import json
from pathlib import Path
from typing import Any


class Report:
    """Appends events to a file, and prints the lines of figures."""

    def __init__(self, path: str | Path):
        self._file = open(path, "a", encoding="utf-8")
        self._case = ""

    def plan(self, cases: list[str]) -> None:
        self._write(event="plan", cases=cases)

    def start(self, case: str, limit: float) -> None:
        self._case = case
        self._write(event="start", case=case, limit=limit)

    def line(self, name: str, **figures: Any) -> None:
        """One result. A figure `ok` that is False makes the case a wrong one."""
        self._write(event="line", case=self._case, name=name, **figures)
        text = ", ".join(f"{key} {_short(value)}" for key, value in figures.items())
        print(f"  {name}: {text}", flush=True)

    def error(self, text: str) -> None:
        self._write(event="error", case=self._case, text=text)
        print(f"  failed: {text}", flush=True)

    def end(self) -> None:
        self._write(event="end", case=self._case)

    def _write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
