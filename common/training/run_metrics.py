"""What a run reports: TensorBoard events, `metrics.jsonl`, and the size of the model."""

import collections
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from clu import metric_writers, parameter_overview

from common.training.distributed import is_main_process
from common.training.workdir import MetricsLog


class RunMetrics:
    """Writes scalars to TensorBoard events and `metrics.jsonl`, in process 0 only.

    with RunMetrics(workdir, start_step) as log:
        log.write(step, {"loss": 1.25})
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        """`start_step`: of the checkpoint that the run goes on from; later lines are dropped."""
        self._writers: tuple[MetricsLog, metric_writers.AsyncWriter] | None = None
        if is_main_process():
            log = MetricsLog(workdir, start_step)
            events = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
            self._writers = log, events

    def __enter__(self) -> "RunMetrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes host scalars for `step` (number of finished steps)."""
        if self._writers is not None:
            log, events = self._writers
            scalars = {name: float(value) for name, value in metrics.items()}
            log.write(step, scalars)
            events.write_scalars(step, scalars)

    def close(self) -> None:
        if self._writers is not None:
            for writer in self._writers:
                writer.close()


def log_parameter_overview(
    params: Any, say: Callable[[str], Any] = print, trained: Any = None, depth: int = 2
) -> None:
    """Prints parameter counts by module, at the start of a run.

    Args:
      params: nested dictionary of arrays or shapes; values are not looked at.
      say: takes the table.
      trained: tree of bools like `params` (`optimizer.trained_mask`), adds a column.
      depth: how many levels of modules are told apart.
    """
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    shapes = parameter_overview.flatten_dict(params)
    masks = parameter_overview.flatten_dict(trained) if trained else {}
    for path, leaf in shapes.items():
        module = "/".join(path.split("/")[:-1][:depth])
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
