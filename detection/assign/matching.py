"""Which ground-truth box an anchor or proposal is matched to, and which are sampled for training.

Shape legend
  N  anchors or proposals of one image
  M  padded ground-truth boxes of one image
  G  padded ignore boxes of one image
  S  sampled slots of one image
  B  images

Functions are per image, and models map them over the batch with `jax.vmap`; only
`ignored_background` takes a batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from common.geometry import boxes as box_ops

# Two equal overlaps may differ in the last bits when XLA compiles them into different fusions.
_TIE = 1e-6


class Match(NamedTuple):
    """Which boxes may be sampled as objects and which as background; some are neither."""

    positive: Bool[Array, " N"]
    negative: Bool[Array, " N"]


def match(
    boxes: Float[Array, "N 4"],
    valid: Bool[Array, " N"],
    gt_boxes: Float[Array, "M 4"],
    gt_valid: Bool[Array, " M"],
    *,
    positive_iou: float,
    negative_iou: float,
    best_match_iou: float | None = None,
    ignore: Bool[Array, " N"] | None = None,
    background_iou: float | None = None,
) -> Match:
    """Decides by IoU with the ground truth.

    Args:
      boxes: anchors or proposals, pixels.
      valid: boxes that take part.
      gt_boxes: ground-truth boxes, pixels.
      gt_valid: which of them are real.
      positive_iou: IoU >= this is positive.
      negative_iou: IoU < this is negative; in between is not trained on.
      best_match_iou: when given, the best boxes of every ground-truth box (all ties) are positive
        too if their IoU is at least this. They are still matched to their own best
        (`matched_idx`).
      ignore: boxes that are never background, from `ignored_background`; None: there are none.
      background_iou: when given, background has at least this IoU with some ground-truth box.
    """
    # Every reduction runs along the last axis: on CPU that is six times as fast as across it, which
    # pays for computing the overlaps in both orientations.
    iou = jnp.where(gt_valid & valid[:, None], box_ops.iou(boxes, gt_boxes), -1.0)
    best = iou.max(axis=1)
    positive = best >= positive_iou
    if best_match_iou is not None:
        transposed = jnp.where(gt_valid[:, None] & valid, box_ops.iou(gt_boxes, boxes), -1.0)
        best_of_gt = transposed.max(axis=1)
        wanted = gt_valid & (best_of_gt >= best_match_iou)
        positive |= ((iou >= best_of_gt - _TIE) & wanted).any(axis=1)
    # Without any ground truth `best` is -1 everywhere, so all valid boxes are negative.
    negative = (best < negative_iou) & ~positive
    if ignore is not None:
        negative &= ~ignore
    if background_iou is not None:
        negative &= best >= background_iou
    return Match(positive & valid, negative & valid)


def ignored(
    boxes: Float[Array, "*B N 4"],
    ignore_boxes: Float[Array, "*B G 4"],
    ignore_valid: Bool[Array, "*B G"],
    threshold: float,
) -> Bool[Array, "*B N"]:
    """Boxes of which more than the share `threshold` of their own area lies in one ignore box."""
    shares = box_ops.ioa(boxes, ignore_boxes)
    return ((shares > threshold) & ignore_valid[..., None, :]).any(axis=-1)


def ignored_background(
    boxes: Float[Array, "N 4"] | Float[Array, "B N 4"], batch: Mapping[str, Array], threshold: float
) -> Bool[Array, "B N"]:
    """Boxes that are not to be sampled as background, because they lie in ignore regions.

    The overlaps are computed only when some image of this device has an ignore box, so that a
    batch without any costs nothing.

    Args:
      boxes: anchors, the same for all images, or proposals of each; pixels.
      batch: `ignore_boxes` (B,G,4), `ignore_valid` (B,G) and `image_valid` (B,). A batch without
        the first two has no ignore regions.
      threshold: `config.model.ignore_ioa`, the share of a box's own area.
    """
    nothing = jnp.zeros((len(batch["image_valid"]), boxes.shape[-2]), bool)
    if "ignore_boxes" not in batch:
        return nothing
    return jax.lax.cond(
        batch["ignore_valid"].any(),
        lambda: ignored(boxes, batch["ignore_boxes"], batch["ignore_valid"], threshold),
        lambda: nothing,
    )


def matched_idx(
    boxes: Float[Array, "S 4"], gt_boxes: Float[Array, "M 4"], gt_valid: Bool[Array, " M"]
) -> Int[Array, " S"]:
    """The ground-truth box of highest IoU, computed for the sampled boxes only."""
    return jnp.where(gt_valid, box_ops.iou(boxes, gt_boxes), -1.0).argmax(axis=1)


def max_positives(num_samples: int, positive_fraction: float) -> int:
    """The number of slots that `sample` lets positives take, the first ones."""
    return max(1, min(int(num_samples * positive_fraction), num_samples))


def sample(
    key: PRNGKeyArray,
    positive: Bool[Array, " N"],
    negative: Bool[Array, " N"],
    num_samples: int,
    positive_fraction: float,
) -> tuple[Int[Array, " S"], Bool[Array, " S"], Bool[Array, " S"]]:
    """Draws a fixed number of slots: positives first (at most the fraction), then negatives.

    Draws are uniform. Negatives fill every slot that positives leave free; slots beyond what the
    image has are invalid.

    Returns:
      (indices into N, is the slot positive, is the slot valid), each of length `num_samples`.
    """
    num_samples = min(num_samples, positive.shape[0])
    max_positive = max_positives(num_samples, positive_fraction)
    lottery = jax.random.uniform(key, positive.shape)
    _, positives = jax.lax.top_k(jnp.where(positive, lottery, -1.0), max_positive)
    _, negatives = jax.lax.top_k(jnp.where(negative, lottery, -1.0), num_samples)
    num_positive = jnp.minimum(positive.sum(), max_positive)
    num_negative = jnp.minimum(negative.sum(), num_samples - num_positive)
    slot = jnp.arange(num_samples)
    is_positive = slot < num_positive
    indices = jnp.where(
        is_positive,
        positives[jnp.minimum(slot, max_positive - 1)],
        negatives[jnp.maximum(slot - num_positive, 0)],
    )
    return indices, is_positive, slot < num_positive + num_negative
