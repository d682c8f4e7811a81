"""What every training command does around its steps: devices, first state, the loop's mechanics.

What happens when stays visible in the command: it walks over `Loop.run` and evaluates where it
wants to.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.io.errors import UserError
from common.io.progress import Progress
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.run_metrics import RunMetrics
from common.training.step import TrainState
from common.training.watchdog import StallWatchdog, check_finite


def start(batch_sizes: Mapping[str, int]) -> tuple[Mesh, Callable[..., None]]:
    """Joins the other processes; returns the mesh and a `print` that only one of them does.

    Raises:
      UserError: one of `batch_sizes`, by field of the config, is no multiple of the devices.
    """
    distributed.initialize()
    mesh = distributed.make_mesh()
    say = print if distributed.is_main_process() else lambda *_, **__: None
    say(
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"{jax.process_count()} processes",
        flush=True,
    )
    for field, size in batch_sizes.items():
        if size % mesh.size:
            raise UserError(
                f"config.{field}: found {size}, expected a multiple of the {mesh.size} devices"
            )
    return mesh, say


class Loop:
    """Steps with all that belongs to each: data, check, progress line, logs, checkpoints.

        with Loop(...) as loop:
            for step in loop.run(step_fn, state, batches):
                if step % every == 0:
                    with loop.pause():
                        loop.log(step, evaluate(loop.state))

    A step whose metrics are not finite stops the run before anything of it is kept.

    Attributes:
      state: after the latest step.
      extra: what the checkpoints say beside the state.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        mesh: Mesh,
        checkpoints: Checkpoints,
        schedule: optax.Schedule,
        *,
        start_step: int,
        num_steps: int,
        steps_per_epoch: int,
        fields: Sequence[str],
        image_name: Callable[[int], str],
        say: Callable = print,
    ):
        """Opens nothing yet.

        Args:
          config: of the run; read here: name, data.batch_size, log.{every_steps, stall_seconds},
            checkpoint.every_steps and, if there, checkpoint.keep_epochs.
          workdir: gets metrics.jsonl and TensorBoard events.
          mesh: all devices.
          checkpoints: of the run.
          schedule: learning rate by step, for the logs.
          start_step: steps done before.
          num_steps: of the whole run.
          steps_per_epoch: of the sampler.
          fields: of the batches, those that the model reads.
          image_name: of an `image_index` of the batches, for errors.
          say: where lines go.
        """
        self._config = config
        self._workdir = workdir
        self._mesh = mesh
        self._checkpoints = checkpoints
        self._schedule = schedule
        self._steps = range(start_step + 1, num_steps + 1)
        self._steps_per_epoch = steps_per_epoch
        self._fields = tuple(fields)
        self._image_name = image_name
        self._say = say
        batch_size = config.data.batch_size
        self._progress = Progress(num_steps, batch_size, mesh.size, steps_per_epoch=steps_per_epoch)
        self.extra = {
            "steps_per_epoch": steps_per_epoch,
            "batch_size": batch_size,
            "config": config.name,
        }
        self._step = start_step
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Loop":
        start_step = self._steps.start - 1
        self._metrics = self._open.enter_context(RunMetrics(self._workdir, start_step))
        stall_seconds = self._config.log.stall_seconds
        self._stall = self._open.enter_context(StallWatchdog(stall_seconds))
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def run(
        self, step_fn: Callable, state: TrainState, batches: Iterator[Mapping[str, np.ndarray]]
    ) -> Iterator[int]:
        """Yields each step once it is done, and kept where a checkpoint is due.

        Args:
          step_fn: jitted `(state, batch) -> (state, metrics)`.
          state: before the first step.
          batches: of this host, in order.
        """
        self.state = state
        del state  # its buffers are given to the first step
        checked = None  # metrics of the step before, looked at while the device works on this one
        for step in self._steps:
            with self._progress.data_wait():
                host_batch = next(batches)
            batch = {name: host_batch[name] for name in self._fields}
            self.state, metrics = step_fn(self.state, distributed.to_global(batch, self._mesh))
            self._progress.step_done(step)
            if checked is not None:
                self._check(*checked)
            checked = (metrics, step, host_batch["image_index"])
            self._stall.beat(step)
            self._step = step
            if step % self._config.log.every_steps == 0 or step in (self._steps[0], self._last):
                figures = self._check(*checked)
                figures["learning_rate"] = float(self._schedule(step - 1))
                self._say(self._progress.line(step, figures), flush=True)
                self._metrics.write(step, figures | self._progress.rates(step))
                self._checkpoints.check()
            if self._checkpoint_due(step):
                self._check(*checked)
                with self._progress.pause():
                    self._checkpoints.save(step, self.state, self.extra)
            yield step
        self._checkpoints.close()

    @property
    def _last(self) -> int:
        return self._steps.stop - 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For what is no training: it is left out of the rates and is no stall."""
        with self._progress.pause():
            yield
        self._stall.beat(self._step)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes figures to the logs."""
        self._metrics.write(step, figures)

    def _checkpoint_due(self, step: int) -> bool:
        return self._config.checkpoint.is_due(step, self._steps_per_epoch, self._last)

    def _check(self, metrics, step: int, image_index: np.ndarray) -> dict[str, float]:
        """Fetches the metrics of a step; stops the run when one is not finite."""
        figures = {name: float(value) for name, value in distributed.to_host(metrics).items()}
        check_finite(figures, step, [self._image_name(i) for i in image_index if i >= 0])
        return figures
