"""What a run reports: TensorBoard events, `metrics.jsonl`, and the size of the model."""

import collections
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from clu import metric_writers, parameter_overview

from common.training.distributed import is_main_process
from common.training.workdir import MetricsLog, write_text


class MetricsWriter:
    """Writes scalars to TensorBoard events and `metrics.jsonl`, in process 0 only."""

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        """`start_step`: of the checkpoint that the run goes on from; later lines are dropped."""
        self._log = self._events = None
        if is_main_process():
            self._log = MetricsLog(workdir, start_step)
            self._events = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes host scalars for `step` (number of finished steps)."""
        if self._log is None:
            return
        scalars = {name: float(value) for name, value in metrics.items()}
        self._log.write(step, scalars)
        self._events.write_scalars(step, scalars)

    def flush(self) -> None:
        """Brings TensorBoard's file up to date; `metrics.jsonl` always is."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._events.close()


def parameter_summary(params: Any, trained: Any, depth: int = 2) -> str:
    """A table of parameter counts by module, for the start of a run.

    Args:
      params: nested dictionary of arrays or shapes.
      trained: tree of bools like `params` (`optimizer.trained_mask`).
      depth: how many levels of modules are told apart.

    Returns:
      lines `module  arrays  parameters  trained`, with the sum last.
    """
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, leaf), is_trained in zip(flat, jax.tree.leaves(trained), strict=True):
        *modules, _ = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        size = int(np.prod(leaf.shape))
        for name in ("/".join(modules[:depth]), "total"):
            row = rows[name]
            row[0] += 1
            row[1] += size
            row[2] += size if is_trained else 0
    rows["total"] = rows.pop("total")  # last
    width = max(map(len, rows))
    lines = [f"{'module':<{width}}  {'arrays':>6}  {'parameters':>12}  {'trained':>12}"]
    lines += [f"{name:<{width}}  {n:>6}  {p:>12,}  {t:>12,}" for name, (n, p, t) in rows.items()]
    return "\n".join(lines)


def write_parameter_overview(path: str | os.PathLike, params: Any) -> None:
    """Writes the table of every parameter with its shape; only shapes of `params` are looked at."""
    if is_main_process():
        # Without statistics: they would be a computation that only this process takes part in.
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        write_text(path, table + "\n")
