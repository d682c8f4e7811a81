"""States and variables of a model on all devices, out of the checkpoints of a work directory."""

import os
from collections.abc import Callable

from etils import epath
from jax import eval_shape, jit
from jax.sharding import Mesh

from common.io.errors import UserError
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.settings import CheckpointSettings
from common.training.step import TrainState


def open_checkpoints(
    workdir: epath.Path, settings: CheckpointSettings, steps_per_epoch: int
) -> Checkpoints:
    """The checkpoints of a training."""
    return Checkpoints(
        workdir / "checkpoints",
        keep_last=settings.keep_last,
        keep_every_steps=steps_per_epoch if settings.keep_epochs else None,
    )


def first_state(
    checkpoints: Checkpoints, init: Callable[[], TrainState], mesh: Mesh, say: Callable
) -> tuple[TrainState, int]:
    """The newest checkpoint's state and its step, else that of `init` and 0; on all devices."""
    step = checkpoints.latest_step() or 0
    if not step:
        return jit(init, out_shardings=distributed.replicated(mesh))(), 0
    abstract = distributed.abstract(eval_shape(init), mesh)
    state, _ = checkpoints.restore(step, abstract)
    say(f"resuming at step {step}", flush=True)
    return state, step


def choose_parts(
    checkpoints: Checkpoints,
    batch_size: int,
    mesh: Mesh,
    accumulate: int,
    say: Callable,
    *,
    whole_batch: bool = False,
) -> int:
    """Parts in which each device computes its images.

    A run that goes on with fewer devices keeps its parts, and so the order of their sums: each
    device computes several of them.

    Args:
      checkpoints: of the run.
      batch_size: images of a step.
      mesh: all devices.
      accumulate: `config.optimizer.accumulate`.
      say: where notes go.
      whole_batch: some layer needs all images at once.

    Raises:
      UserError: the batch cannot be shared by all parts.
    """
    parts = mesh.size * accumulate
    if batch_size % parts:
        raise UserError(
            f"config.data.batch_size: found {batch_size}, expected a multiple of {parts}: "
            f"{mesh.size} devices x config.optimizer.accumulate {accumulate}"
        )
    if checkpoints.latest_step() is None:
        return accumulate
    before = checkpoints.read_extra().get("parts", parts)
    if before > parts and before % mesh.size == 0 and not whole_batch:
        say(f"the batch stays in {before} parts, {before // mesh.size} a device", flush=True)
        return before // mesh.size
    if before != parts:
        say(f"note: {parts} parts of a batch, before {before}: sums are rounded otherwise")
    return accumulate


def restore_variables(
    workdir: str | os.PathLike, shapes: dict, mesh: Mesh, step: int | None = None
) -> tuple[dict, int]:
    """Parameters and statistics of a checkpoint on all devices, and its step.

    Args:
      workdir: of the run, local or gs://.
      shapes: of {'params', 'batch_stats'}, see `common.training.step.variable_shapes`.
      mesh: all devices.
      step: None means the newest.

    Raises:
      UserError: no such checkpoint, or one of another model.
    """
    checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints")
    abstract = distributed.abstract(shapes, mesh)
    if step is None:
        step, variables, _ = checkpoints.restore_newest(abstract)
    else:
        variables, _ = checkpoints.restore_params(step, abstract)
    return variables, step
