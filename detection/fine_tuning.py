"""Starts a training from a whole trained detector: `config.init_from`."""

import dataclasses
from collections.abc import Callable, Sequence

from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from common.data.model_classes import read_model_classes
from common.nn.weights.fine_tuning import TrainedModel, fine_tuned, read_trained_model
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.step import TrainState


def with_trained_detector(
    state: TrainState, init_from: str, labels: Sequence[str], mesh: Mesh, say: Callable
) -> TrainState:
    """The state of a new run with all values of a trained detector that fit; says what does not.

    The optimiser's state stays that of a new run.

    Args:
      state: before the first step, on the mesh.
      init_from: work directory of the trained detector, whose newest checkpoint is taken, or a
        `.safetensors` file of `scripts.export_weights`.
      labels: of the classes of the new run.
      mesh: all devices.
      say: where the report goes.

    Raises:
      UserError: nothing readable there, or nothing that fits.
    """
    if init_from.endswith(".safetensors"):
        trained = read_trained_model(init_from)
    else:
        trained = trained_in(init_from)
    variables = distributed.to_host(state.variables)
    variables, report = fine_tuned(variables, labels, trained)
    say(str(report), flush=True)
    variables = distributed.replicate(variables, mesh)
    return dataclasses.replace(
        state,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", state.batch_stats),
    )


def trained_in(workdir: str, step: int | None = None) -> TrainedModel:
    """The model of a checkpoint (None: the newest) of a work directory.

    Raises:
      UserError: no checkpoint, or no `classes.csv`.
    """
    variables, _ = Checkpoints(epath.Path(workdir) / "checkpoints").restore_params(step)
    classes = read_model_classes(workdir)
    weights = traverse_util.flatten_dict(variables, sep="/")
    return TrainedModel(str(workdir), classes.labels, weights, classes.names, classes.hierarchy)
