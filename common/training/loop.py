"""The loop that all trainings share: steps, log, checkpoints, evaluations, and how it stops.

A training makes its data, model and state, and hands them to `train_loop`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from etils import epath
from jax.sharding import Mesh

from common.data.batches import Batches
from common.io import activity
from common.io.progress import Progress
from common.training import distributed, hardware, preemption
from common.training.checkpoint import Checkpoints
from common.training.goodput import Goodput
from common.training.profiling import Profiler
from common.training.run_metrics import RunMetrics
from common.training.settings import CheckpointSettings, LogSettings
from common.training.step import TrainState
from common.training.watchdog import MetricsCheck, StallWatchdog


class EvaluationTimes(Protocol):
    """When a training measures its state."""

    @property
    def is_on(self) -> bool:
        """Whether it does at all; then also at its end."""

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Whether it does after a step, before it goes on."""


class LoopSettings(Protocol):
    """The fields of a run's settings that the loop looks at."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> LogSettings: ...

    @property
    def checkpoint(self) -> CheckpointSettings: ...

    @property
    def evaluation(self) -> EvaluationTimes: ...


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which steps a training takes.

    Attributes:
      start: steps that are done already.
      total: steps of the whole training.
      per_epoch: steps of an epoch.
      batch_size: images of a step, of all devices together.
    """

    start: int
    total: int
    per_epoch: int
    batch_size: int


def train_loop(
    workdir: epath.Path,
    settings: LoopSettings,
    steps: Steps,
    state: TrainState,
    *,
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    step_flops: Callable[[TrainState, dict], float],
    learning_rate: Callable[[int], Any],
    batches: Batches,
    fields: Callable[[int], Iterable[str]],
    check: MetricsCheck,
    index: str = "image_index",
    measure: Callable[[int, dict, RunMetrics], dict[str, float]],
    measured: str,
    checkpoints: Checkpoints,
    parts: int,
    mesh: Mesh,
    say: Callable,
) -> tuple[TrainState, dict[str, float]]:
    """Takes all steps; returns the last state and the figures of the last evaluation.

    Args:
      workdir: of the run.
      settings: of the run.
      steps: to take.
      state: before them.
      train_step: (state, batch on the devices) -> (state, metrics).
      step_flops: of the same arguments.
      learning_rate: of the step behind so many.
      batches: one for each step.
      fields: of a batch that the step behind so many reads.
      check: of the metrics.
      index: field with the numbers by which `check` names examples.
      measure: figures of (step, variables, log) for an evaluation.
      measured: what is, such as the split and the metric; another one is another evaluation.
      checkpoints: are closed.
      parts: that a batch is summed up in, on all devices together.
      mesh: all devices.
      say: where lines go.
    """
    extra = {
        "steps_per_epoch": steps.per_epoch,
        "batch_size": steps.batch_size,
        "config": settings.name,
        "parts": parts,
        "num_steps": steps.total,
    }
    progress = Progress(
        steps.total,
        steps.batch_size,
        mesh.size,
        steps_per_epoch=steps.per_epoch,
        peak_flops=hardware.peak_flops(mesh.devices.flat[0].device_kind),
    )
    step = steps.start

    def save_stopped() -> None:
        if step > steps.start:
            check.latest()  # nothing that is not finite is kept
        checkpoints.save(step, state, extra, wait=True)

    with (
        RunMetrics(workdir, steps.start) as log,
        Goodput(workdir, steps.start) as goodput,
        Profiler(workdir / "profile", settings.log.profile_steps, say) as profiler,
        StallWatchdog.of(settings.log),
        preemption.saving(save_stopped),
        checkpoints,  # an error in the loop does not lose the one that is being written
    ):

        def evaluate(step: int, variables: dict) -> dict[str, float]:
            run = functools.partial(measure, step, variables, log)
            with progress.pause(activity.EVALUATION):
                return log.evaluated(step, measured, run)

        if settings.evaluation.is_due(step, steps.per_epoch, steps.total):
            evaluate(step, state.variables)  # unless it was made before the run stopped
        for step, batch in enumerate(progress.timed(batches), start=steps.start + 1):
            on_devices = distributed.to_global(batch, mesh, fields(step - 1))
            profiler.before(step)
            state, metrics = train_step(state, on_devices)
            profiler.after(step, metrics)
            progress.step_done(step, step_flops(state, on_devices))
            check.one_behind(step, metrics, batch[index])

            if settings.log.is_due(step, steps.start + 1, steps.total):
                figures = check.latest() | {"learning_rate": float(learning_rate(step - 1))}
                figures |= hardware.device_memory(mesh)
                say(progress.line(step, figures) + distributed.slowest(), flush=True)
                log.write(step, figures | progress.rates(step))
                goodput.write(step)
                checkpoints.check()

            if settings.checkpoint.is_due(step, steps.per_epoch, steps.total):
                check.latest()  # nothing that is not finite is kept
                with progress.pause(activity.CHECKPOINT):
                    checkpoints.save(step, state, extra)

            if settings.evaluation.is_due(step, steps.per_epoch, steps.total):
                evaluate(step, state.variables)
            preemption.passes()

        with progress.pause(activity.CHECKPOINT):
            checkpoints.close()
        if batches.left_out:
            say(f"data: {batches.left_out}", flush=True)
        figures = evaluate(steps.total, state.variables) if settings.evaluation.is_on else {}
    return state, figures
