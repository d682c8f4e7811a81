"""Where the time of a run went, all its starts together: `goodput.json` of the work directory.

    {"seconds": {"init": 31.5, "compile": 92.1, "input": 4.0, "steps": 5310.2, "checkpoint": 12.5,
                 "evaluation": 410.7, "lost": 88.0, "down": 240.3},
     "goodput": 0.858, "starts": 3, "latest": {...}}

`lost` is work that was done again: steps after the checkpoint that the next start went on from.
`down` is the time between two starts, and what a killed start had not reported. `goodput` is the
share of `steps` in all seconds. `latest` is the last start, which the next one settles.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from common.io import activity
from common.io.atomic import write_json
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike, to_epath
from common.training.distributed import is_main_process

PARTS = ("init", "compile", "input", "steps", "checkpoint", "evaluation", "lost", "down")
_PART_OF = {
    activity.INPUT: "input",
    activity.COMPILING: "compile",
    activity.CHECKPOINT: "checkpoint",
    activity.EVALUATION: "evaluation",
    activity.SCORING: "evaluation",
}


class Goodput:
    """Keeps `goodput.json`, in process 0 only. Everything before it is made counts as init.

    with Goodput(workdir, start_step) as goodput:
        goodput.write(step)
    """

    def __init__(
        self,
        workdir: PathLike,
        start_step: int,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
        spent: Callable[[], dict[str, float]] = activity.spent,
    ):
        """Settles what earlier starts left.

        Args:
          workdir: of the run.
          start_step: of the checkpoint that the run goes on from, or 0.
          began: time at which this process started; tests pass their own.
          clock: seconds since the epoch.
          spent: seconds of this process by activity.

        Raises:
          UserError: a `goodput.json` that is none.
        """
        self._path = to_epath(workdir) / "goodput.json"
        self._clock, self._spent = clock, spent
        self._began = process_start() if began is None else began
        self._first_step = self._step = start_step
        self._before, self._starts = dict.fromkeys(PARTS, 0.0), 1
        if is_main_process() and self._path.exists():
            record = read_json(self._path)
            try:
                self._before = settled(record, start_step, self._began)
                self._starts = record["starts"] + 1
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self._path}: not written by a training; remove it") from error
        self._spent_before = spent()
        self._loop = clock()

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        # Of a full disk, say, what came first is the one to tell.
        with contextlib.suppress(*((OSError, UserError) if error else ())):
            self.write(self._step)

    def write(self, step: int) -> None:
        """Writes the file; `step` was done."""
        self._step = step
        if not is_main_process():
            return
        now, spent = self._clock(), self._spent()
        seconds = dict.fromkeys(PARTS, 0.0)
        for what, part in _PART_OF.items():
            seconds[part] += spent.get(what, 0.0)
        in_loop = sum(spent.get(what, 0.0) - self._spent_before.get(what, 0.0) for what in _PART_OF)
        seconds["init"] = self._loop - self._began - sum(self._spent_before.values())
        seconds["steps"] = now - self._loop - in_loop
        total = {part: self._before[part] + seconds[part] for part in PARTS}
        record = {
            "seconds": total,
            "goodput": total["steps"] / max(sum(total.values()), 1e-9),
            "starts": self._starts,
            "latest": {
                "began": self._began,
                "written": now,
                "first_step": self._first_step,
                "step": step,
                "seconds": seconds,
            },
        }
        write_json(self._path, record)


def settled(record: dict[str, Any], start_step: int, began: float) -> dict[str, float]:
    """The seconds of all earlier starts, when the next one begins at a step and a time.

    Steps past `start_step` were lost, with the input that they waited for.
    """
    seconds, latest = dict(record["seconds"]), record["latest"]
    done = latest["step"] - latest["first_step"]
    lost = latest["step"] - max(start_step, latest["first_step"])
    for part in ("steps", "input") if done > 0 and lost > 0 else ():
        moved = latest["seconds"][part] * lost / done
        seconds[part] -= moved
        seconds["lost"] += moved
    seconds["down"] += max(began - latest["written"], 0.0)
    return seconds


def process_start() -> float:
    """When this process was started, seconds since the epoch."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + ticks / os.sysconf("SC_CLK_TCK")
