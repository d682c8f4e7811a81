"""What a work directory tells about its run: logged curves, and evaluations with their tables.

Shape legend: n points of a curve.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike, to_epath

_PER_CLASS = "PerformanceByCategory/"
_PLACES = ("evaluation/*/*_metrics.json", "watch/*/*/*_metrics.json")


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean of up to `window` values ending at each one."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One scored split of one checkpoint.

    Attributes:
      step: of the checkpoint.
      name: of the split, with `_test_time` where several views were used.
      figures: official name -> value, those of classes left out.
      classes: label -> AP of a class.
      table: its detections; None: not kept.
    """

    step: int
    name: str
    figures: dict[str, float]
    classes: dict[str, float]
    table: epath.Path | None


class RunLog:
    """The lines of `metrics.jsonl`, in order of steps."""

    def __init__(self, workdir: PathLike):
        """Raises UserError where there is no such file, or a line of it is not JSON."""
        self.workdir = to_epath(workdir)
        self.path = self.workdir / "metrics.jsonl"
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file, expected the work directory of a run")
        self.lines: list[dict[str, Any]] = []
        texts = self.path.read_text().splitlines()
        for number, text in enumerate(texts, 1):
            try:
                self.lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                if number < len(texts):  # the last one may be in the middle of being written
                    raise UserError(f"{self.path}, line {number}: not JSON: {error}") from error

    @functools.cached_property
    def names(self) -> list[str]:
        """Figures that the run logged, in the order of their first appearance."""
        found = dict.fromkeys(name for line in self.lines for name in line)
        return [name for name in found if name not in ("step", "evaluation_of")]

    @functools.cached_property
    def goodput(self) -> dict[str, Any]:
        """`goodput.json` (`common.training.goodput`); empty where the run wrote none."""
        file = self.workdir / "goodput.json"
        return read_json(file) if file.exists() else {}

    def curve(self, name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Steps and values of one figure.

        Raises:
          UserError: the run has no such figure; the message lists those that it has.
        """
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        if not points:
            known = ", ".join(sorted(self.names))
            raise UserError(f"{self.path}: no {name!r}, expected one of {known}")
        steps, values = np.array(points, np.float64).T
        return steps, values


def read_evaluations(workdir: PathLike) -> list[Evaluation]:
    """Evaluations of a run, those of jobs beside it included; in order of steps, then names.

    Of a step that both scored, the training's own is taken.
    """
    found: dict[tuple[int, str], Evaluation] = {}
    for place in _PLACES:
        for path in to_epath(workdir).glob(place):
            if not path.parent.name.isdecimal():
                continue
            step, name = int(path.parent.name), path.name.removesuffix("_metrics.json")
            figures = {k: v for k, v in read_json(path).items() if isinstance(v, int | float)}
            table = path.parent / f"{name}.parquet"
            evaluation = Evaluation(
                step,
                name,
                {key: value for key, value in figures.items() if _PER_CLASS not in key},
                {_label(key): value for key, value in figures.items() if _PER_CLASS in key},
                table if table.exists() else None,
            )
            found.setdefault((step, name), evaluation)
    return [found[key] for key in sorted(found)]


def _label(key: str) -> str:
    """`.../PerformanceByCategory/AP@0.5IOU//m/01g317` -> `/m/01g317`."""
    return key.split(_PER_CLASS, 1)[1].split("/", 1)[1]
