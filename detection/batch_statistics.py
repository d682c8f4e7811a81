"""Batch-norm statistics of given parameters, measured on training batches.

Averaged parameters have other activations than any of their parents, so the mean of the parents'
running statistics is not theirs. Here the parameters stay fixed, and each norm's mean and variance
over all images of the batches are computed ("precise batch norm", Wu & Johnson 2021).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from common.data.dataset import Dataset
from common.data.input import train_batches
from common.data.plans.plan import train_plan
from common.io.errors import UserError
from common.io.parallel import behind
from common.io.progress import Progress
from common.nn.layers.norm import Norm
from common.training import distributed
from common.training.compiling import announced
from common.training.distributed import DATA_AXIS
from common.training.step import variable_shapes
from detection.batch_fields import init_shapes, train_shapes
from detection.models.box_refiner import BoxRefiner
from detection.models.faster_rcnn import FasterRCNN
from detection.refine import open_proposals
from detection.settings import RunSettings


def recompute_batch_stats(
    settings: RunSettings,
    model: FasterRCNN | BoxRefiner,
    variables: Mapping[str, Any],
    dataset: Dataset,
    mesh: Mesh,
    num_batches: int,
    *,
    say: Callable = print,
) -> dict[str, Any]:
    """Statistics of all norms that training updates; the others keep theirs.

    The batches are the first ones of training: its sampler, augmentation and batch size, of which
    'sync' norms see the whole and 'batch' norms each device's part, as in training. (The variance
    of 'batch' norms is that within the parts.)

    Args:
      settings: of the run.
      model: as `detection.models.faster_rcnn.build` makes it.
      variables: {'params', 'batch_stats'} in host memory.
      dataset: with the training split.
      mesh: all devices.
      num_batches: how many to look at; a thousand or so.
      say: where progress lines go.

    Returns:
      The new `batch_stats`, NumPy.

    Raises:
      UserError: no norm of the model is updated in training, or the batch size does not suit.
    """
    momenta = norm_momenta(settings, model)
    if not momenta:
        raise UserError(
            f"config.model.norm: found {settings.model.norm!r}, whose statistics training does not "
            "change; expected 'batch' or 'sync' to recompute them"
        )
    if settings.data.batch_size % mesh.size:
        raise UserError(
            f"config.data.batch_size: found {settings.data.batch_size}, expected a multiple of the "
            f"{mesh.size} devices"
        )
    plan = train_plan(dataset, settings.data, settings.seed)
    stats = flax.traverse_util.flatten_dict(dict(variables["batch_stats"]))
    # Starting at zero, a step leaves (1 - momentum) times the batch's own figures.
    start = {
        path: np.zeros_like(value) if path[:-1] in momenta else value
        for path, value in stats.items()
    }
    fixed = distributed.replicate(
        {"params": variables["params"], "batch_stats": flax.traverse_util.unflatten_dict(start)},
        mesh,
    )
    measure = announced(jax.jit(make_measure_step(model, mesh)), "norms", say)
    progress = Progress(
        num_batches, settings.data.batch_size, mesh.size, what="batch statistics", say=say
    )
    sums = {path: np.zeros((2, *stats[(*path, "mean")].shape)) for path in momenta}

    def add(measured) -> None:
        measured = flax.traverse_util.flatten_dict(distributed.to_host(measured))
        for path, momentum in momenta.items():
            mean, var = (
                measured[(*path, name)].astype(np.float64) / (1 - momentum)
                for name in ("mean", "var")
            )
            sums[path] += [mean, var + mean**2]

    batches = train_batches(
        dataset,
        plan,
        settings.data,
        seed=settings.seed,
        num_steps=num_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        proposals=open_proposals(settings, dataset, say),
    )
    key, fields = jax.random.key(settings.seed), train_shapes(settings.data, 1, dataset.num_classes)
    started = (
        measure(fixed, jax.random.fold_in(key, number), distributed.to_global(batch, mesh, fields))
        for number, batch in enumerate(batches, start=1)
    )
    for number, measured in enumerate(behind(started), start=1):
        add(measured)
        progress.report(number)
    for path, total in sums.items():
        mean, mean_square = total / num_batches
        stats[(*path, "mean")] = mean.astype(np.float32)
        stats[(*path, "var")] = np.maximum(mean_square - mean**2, 0.0).astype(np.float32)
    return flax.traverse_util.unflatten_dict(stats)


def norm_momenta(
    settings: RunSettings, model: FasterRCNN | BoxRefiner
) -> dict[tuple[str, ...], float]:
    """Momentum of each norm whose running statistics training updates, by its path."""
    momenta = {}

    def note(call, args, kwargs, context):
        norm = context.module
        if isinstance(norm, Norm) and norm.kind in ("batch", "sync"):
            momenta[norm.path] = norm.momentum
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variable_shapes(model, init_shapes(settings.data))
    return momenta


def make_measure_step(model: FasterRCNN | BoxRefiner, mesh: Mesh) -> Callable:
    """`(variables, key, batch) -> batch_stats` after one batch in training mode.

    The losses are not asked for, so the compiler drops what only they need.
    """

    def measure(variables, key, batch):
        streams = {
            name: jax.random.fold_in(key, i) for i, name in enumerate(("sampling", "dropout"))
        }
        _, mutated = model.apply(
            variables, batch, train=True, rngs=streams, mutable=["batch_stats"]
        )
        return mutated["batch_stats"]

    return jax.shard_map(
        measure, mesh=mesh, in_specs=(P(), P(), P(DATA_AXIS)), out_specs=P(), check_vma=False
    )
