"""Second stage: classify each region and refine its box, one regression per class.

Shape legend
  B  images
  R  regions (sampled RoIs in training, proposals in inference)
  P  proposals
  M  padded ground-truth boxes
  K  classes; logits have K + 1 columns, column 0 is background
  S  pooled side (7)
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common import boxes as box_ops
from detection import losses, matching
from detection.models.rpn import Proposals


class RoITargets(NamedTuple):
    """Sampled regions of a batch and what each should become."""

    boxes: Float[Array, "B R 4"]
    labels: Int[Array, "B R"]  # 0 background, class + 1 otherwise
    truth: Float[Array, "B R 4"]  # ground-truth box of a positive region
    valid: Bool[Array, "B R"]


def sample_rois(
    keys: Array,
    proposals: Proposals,
    truth: Float[Array, "B M 4"],
    classes: Int[Array, "B M"],
    truth_valid: Bool[Array, "B M"],
    *,
    num_samples: int,
    positive_fraction: float,
    positive_iou: float,
    negative_iou: float,
) -> RoITargets:
    """Draws the regions to train on from proposals and the ground-truth boxes themselves."""

    def draw(key, boxes, valid, truth, classes, truth_valid):
        boxes = jnp.concatenate([truth, boxes])
        valid = jnp.concatenate([truth_valid, valid])
        found = matching.match(
            boxes, valid, truth, truth_valid, positive_iou=positive_iou, negative_iou=negative_iou
        )
        index, positive, slot_valid = matching.sample(
            key, found.positive, found.negative, num_samples, positive_fraction
        )
        sampled = boxes[index]
        answer = matching.best_truth(sampled, truth, truth_valid)
        labels = jnp.where(positive, classes[answer] + 1, 0)
        return RoITargets(sampled, labels, truth[answer], slot_valid)

    targets = jax.vmap(draw)(
        keys, proposals.boxes, proposals.valid, truth, classes, truth_valid
    )
    return jax.tree.map(jax.lax.stop_gradient, targets)


class TwoFCHead(nn.Module):
    """Two fully connected layers, then K + 1 class logits and 4 deltas for each of K classes."""

    num_classes: int
    width: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pooled: Float[Array, "B R S S C"]
    ) -> tuple[Float[Array, "B R K1"], Float[Array, "B R K 4"]]:
        batch, regions = pooled.shape[:2]
        # One (B * R, features) matrix: rank-3 dense layers are slower on CPU.
        x = pooled.reshape(batch * regions, -1)
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, kernel_init=dense, name=name)(x))
        logits = nn.Dense(
            self.num_classes + 1, dtype=self.dtype, name="classifier",
            kernel_init=nn.initializers.normal(0.01),
        )(x)
        deltas = nn.Dense(
            4 * self.num_classes, dtype=self.dtype, name="regressor",
            kernel_init=nn.initializers.normal(0.001),
        )(x)
        return (
            logits.reshape(batch, regions, -1).astype(jnp.float32),
            deltas.reshape(batch, regions, self.num_classes, 4).astype(jnp.float32),
        )


def box_head_losses(
    logits: Float[Array, "B R K1"],
    deltas: Float[Array, "B R K 4"],
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    *,
    stds: tuple[float, float, float, float],
    beta: float,
    normaliser: str,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Softmax cross-entropy over K + 1 and smooth L1 on the deltas of the true class.

    Args:
      logits, deltas: head outputs.
      targets: from `sample_rois`.
      image_valid: images that count.
      stds: standard deviations by which deltas are divided.
      beta: where smooth L1 turns linear.
      normaliser: box loss is divided by the number of "sampled" or of "positive" regions.
      axis_name: device axis over which regions are counted.
    """
    valid = targets.valid & image_valid[:, None]
    positive = valid & (targets.labels > 0)
    classification = losses.softmax_cross_entropy(logits, targets.labels)
    # Row `labels - 1`; background (-1) gives an all-zero row, masked below.
    chosen = jax.nn.one_hot(targets.labels - 1, deltas.shape[2], dtype=jnp.float32)
    chosen = (deltas * chosen[..., None]).sum(axis=2)
    wanted = box_ops.encode(targets.truth, targets.boxes, stds)
    regression = losses.smooth_l1(chosen - wanted, beta).sum(axis=-1)
    count = valid.sum() if normaliser == "sampled" else positive.sum()
    return {
        "box_class": losses.share(classification, valid, valid.sum(), axis_name),
        "box_regression": losses.share(regression, positive, count, axis_name),
    }


def head_accuracy(
    logits: Float[Array, "B R K1"],
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Share of positive regions whose class is right, and the number of positives per image."""
    positive = targets.valid & image_valid[:, None] & (targets.labels > 0)
    right = (logits.argmax(axis=-1) == targets.labels).astype(jnp.float32)
    ones = jnp.ones_like(right)
    return {
        "positive_accuracy": losses.share(right, positive, positive.sum(), axis_name),
        "positives_per_image": losses.share(ones, positive, image_valid.sum(), axis_name),
    }
