"""The compiled steps of evaluation and export.

Shapes: B crops, H W canvas, V voters, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt16

from common.masks.probability import quantise
from common.nn.layers.canvas import mirror
from common.training.distributed import DATA_AXIS, sum_over_devices
from segmentation.losses import pixel_losses
from segmentation.models.segmenter import Segmenter, known_pixels

FIGURES = (
    "loss",
    "pixels",
    "correct",
    "intersection",
    "union",  # sums over pixels
    "instances",
    "iou",
    "iou_above_0.5",
    "iou_above_0.75",  # sums over crops
)


def probabilities(
    model: Segmenter, variables: dict, batch: Mapping[str, Array], mirrored: bool
) -> list[Float[Array, "B H W"]]:
    """Foreground probabilities of the crops; with `mirrored` also those of the mirrored crops,
    mirrored back."""
    if not mirrored:
        return [_foreground(model, variables, batch)]
    widths = batch["image_size"][:, 1]
    other = {**batch, "image": mirror(batch["image"], widths)}
    both = {name: jnp.concatenate([batch[name], other[name]]) for name in batch}
    plain, turned = jnp.split(_foreground(model, variables, both), 2)
    return [plain, mirror(turned, widths)]


def _foreground(
    model: Segmenter, variables: dict, batch: Mapping[str, Array]
) -> Float[Array, "B H W"]:
    outputs: Any = model.apply(variables, batch, train=False)
    return jax.nn.sigmoid(outputs["logits"])


@dataclasses.dataclass(frozen=True)
class Voter:
    """One opinion: a network, alone or averaged with itself on the mirrored crop."""

    network: int
    flip: bool


@functools.cache
def vote_step(
    models: tuple[Segmenter, ...], voters: tuple[Voter, ...], mean: bool, mesh: Mesh
) -> Callable[[tuple[dict, ...], Mapping[str, Array]], UInt16[Array, "B V H W"]]:
    """Jitted `(variables of each network, batch) -> probabilities` of the voters on one batch.

    They are whole numbers, 1 is `PROBABILITY_ONE`; with `mean` V is 1, the mean of all voters.
    """

    def step(variables, batch):
        by_network = []
        for i, model in enumerate(models):
            mirrored = any(voter.flip for voter in voters if voter.network == i)
            by_network.append(probabilities(model, variables[i], batch, mirrored))
        maps = jnp.stack(
            [
                sum(by_network[v.network]) / 2 if v.flip else by_network[v.network][0]
                for v in voters
            ],
            axis=1,
        )
        maps = maps.mean(axis=1, keepdims=True) if mean else maps
        return quantise(maps)

    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(DATA_AXIS), check_vma=False
        )
    )


@functools.cache
def evaluation_step(
    model: Segmenter, num_classes: int, flip: bool, mesh: Mesh
) -> Callable[[dict, Mapping[str, Array]], Float[Array, "K F"]]:
    """Jitted `(variables, batch) -> sums by class` of all devices, in the order of FIGURES."""

    def step(variables, batch):
        inputs = {k: v for k, v in batch.items() if not k.startswith("mask")}
        if flip:
            mean = sum(probabilities(model, variables, inputs, True)) / 2
            logits = jax.scipy.special.logit(jnp.clip(mean, 1e-7, 1 - 1e-7))
        else:
            outputs: Any = model.apply(variables, inputs, train=False)
            logits = outputs["logits"]
        sums = pixel_losses(logits, batch["mask"], known_pixels(batch))
        real = batch["image_valid"]
        # Without foreground in both, nothing is wrong.
        iou = jnp.where(sums["union"] > 0, sums["intersection"] / jnp.maximum(sums["union"], 1), 1)
        sums |= {
            "instances": real,
            "iou": iou * real,
            "iou_above_0.5": real & (iou > 0.5),
            "iou_above_0.75": real & (iou > 0.75),
        }
        rows = jnp.stack([sums[name].astype(jnp.float32) for name in FIGURES], axis=1)
        # Empty slots have zeros everywhere, their class does not matter.
        by_class = jax.ops.segment_sum(rows, jnp.maximum(batch["classes"], 0), num_classes)
        return sum_over_devices(by_class)

    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(), check_vma=False)
    )
