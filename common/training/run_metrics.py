"""What a run reports: TensorBoard events, `metrics.jsonl`, and the size of the model."""

import collections
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from common.training import distributed
from common.training.distributed import is_main_process
from common.training.workdir import MetricsLog

_DEPTH = 2  # levels of modules that the overview tells apart


class RunMetrics:
    """Writes scalars to TensorBoard events and `metrics.jsonl`, in process 0 only.

    Where clu or TensorFlow is not installed there are no events, and one line says so.

    with RunMetrics(workdir, start_step) as log:
        log.write(step, {"loss": 1.25})
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        """`start_step`: of the checkpoint that the run goes on from; later lines are dropped."""
        self._log: MetricsLog | None = None
        self._events: Any = None
        if is_main_process():
            self._log = MetricsLog(workdir, start_step)
            self._events = _open_events(workdir)

    def __enter__(self) -> "RunMetrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes host scalars for `step` (number of finished steps)."""
        if self._log is not None:
            scalars = {name: float(value) for name, value in metrics.items()}
            self._log.write(step, scalars)
            if self._events is not None:
                self._events.write_scalars(step, scalars)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Adds images (1, height, width, 3) by name to the events, where there are any."""
        if self._events is not None:
            self._events.write_images(step, draw())

    def evaluated(
        self, step: int, what: str, evaluate: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """The figures of an evaluation, made now unless the log has them: each exists once.

        All processes call it.

        Args:
          step: whose state is measured.
          what: is measured, such as the split and the metric: another one is another evaluation.
          evaluate: makes the figures (those of process 0 count) and leaves its files.
        """
        known = self._log.evaluation(step, what) if self._log is not None else None
        if distributed.same_everywhere(known is not None):
            return known or {}
        figures = dict(evaluate())
        if self._log is not None and figures:
            scalars = {f"evaluation/{name}": float(value) for name, value in figures.items()}
            self._log.write(step, {"evaluation_of": what, **scalars})
            if self._events is not None:
                self._events.write_scalars(step, scalars)
        return figures

    def close(self) -> None:
        for writer in (self._log, self._events):
            if writer is not None:
                writer.close()


def _open_events(workdir: str | os.PathLike) -> Any:
    """A writer of TensorBoard events, None where what writes them is not installed."""
    try:
        # Here, not above: it imports TensorFlow.
        from clu import metric_writers
    except ImportError as error:
        print(f"no TensorBoard events, metrics.jsonl has the figures: {error}", flush=True)
        return None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))


def log_parameter_overview(
    params: Any, say: Callable[[str], Any] = print, trained: Any = None
) -> None:
    """Prints parameter counts by module, at the start of a run.

    Args:
      params: nested dictionary of arrays or shapes; values are not looked at.
      say: takes the table.
      trained: tree of bools like `params` (`optimizer.trained_mask`), adds a column.
    """
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    shapes = flatten_dict(params, sep="/")
    masks = flatten_dict(trained, sep="/") if trained else {}
    for path, leaf in shapes.items():
        module = "/".join(path.split("/")[:-1][:_DEPTH])
        size = math.prod(leaf.shape)
        for name in (module, "total"):
            row = rows[name]
            row[0] += 1
            row[1] += size
            row[2] += size if masks.get(path, True) else 0
    rows["total"] = rows.pop("total")  # last
    width = max(map(len, rows))
    titles = ["parameters", "trained"] if trained else ["parameters"]
    lines = [f"{'module':<{width}}  arrays" + "".join(f"{title:>14}" for title in titles)]
    for name, (arrays, *sizes) in rows.items():
        columns = "".join(f"{size:>14,}" for size in sizes[: len(titles)])
        lines.append(f"{name:<{width}}  {arrays:>6}{columns}")
    say("\n".join(lines))
