"""Masks in the second stage: which RoIs train the mask heads, and the masks of given boxes.

The heads read the pyramid that boxes are read from: of a decoupled backbone that of the branch for
boxes. A cascade has one head, trained on the RoIs of its last stage, or one a stage.

Shape legend
  B  images
  R  sampled RoIs per image
  F  the first RoIs; all positives are among them
  D  boxes per image in inference
  S  side of a mask
  P  pooled side, C channels of the pyramid
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detection.losses.mask import mask_losses, mask_targets
from detection.structures import Pool, RoITargets

MaskHead = Callable[..., Array]  # of pooled features, classes, and which boxes are present


class MaskBranch(NamedTuple):
    """What masks of a batch are made with.

    Attributes:
      pool: reads the features of boxes.
      heads: of each stage; None: no mask is trained on the RoIs of that stage.
    """

    pool: Pool
    heads: Sequence[MaskHead | None]


def train_masks(
    branch: MaskBranch,
    head: MaskHead,
    targets: RoITargets,
    batch: Mapping[str, Array],
    axis_name: str | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss of one head, unweighted, and the mean IoU of its masks: both of `mask_losses`.

    Only positive RoIs count, and of these only those whose object has a mask: a photo or box
    without masks gives no gradient.

    Args:
      branch: of the batch.
      head: of the stage.
      targets: the first F of the stage's RoIs.
      batch: image_valid (B,), gt_masks and gt_has_mask (`detection.batch_fields`).
      axis_name: device axis over which RoIs are counted.
    """
    has_mask = jnp.take_along_axis(batch["gt_has_mask"], targets.matched_idx, axis=1)
    counted = targets.positive(batch["image_valid"]) & has_mask
    logits = head(
        _pooled(branch, targets.boxes, counted), jnp.maximum(targets.labels - 1, 0), counted
    )
    target = mask_targets(
        batch["gt_masks"], targets.gt_boxes, targets.matched_idx, targets.boxes, logits.shape[-1]
    )
    return mask_losses(logits, target, counted, axis_name)


def predict_masks(
    branch: MaskBranch,
    boxes: Float[Array, "B D 4"],
    classes: Int[Array, "B D"],
    valid: Bool[Array, "B D"],
) -> Float[Array, "B D S S"]:
    """Foreground probabilities inside each box, the mean over all heads; 0 where not `valid`.

    Args:
      branch: of the batch.
      boxes: canvas pixels.
      classes: 0..K-1.
      valid: boxes that are real.
    """
    pooled = _pooled(branch, boxes, valid)
    heads = [head for head in branch.heads if head is not None]
    masks = sum(jax.nn.sigmoid(head(pooled, classes, valid)) for head in heads) / len(heads)
    return jnp.where(valid[..., None, None], masks, 0.0)


def _pooled(
    branch: MaskBranch, boxes: Float[Array, "B R 4"], present: Bool[Array, "B R"]
) -> Float[Array, "B R P P C"]:
    """Features of the boxes that are present; others are empty boxes, which read a single cell."""
    return branch.pool(jnp.where(present[..., None], boxes, 0.0))
