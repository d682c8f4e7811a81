"""Losses of the region proposal network, over sampled anchors.

Shape legend
  B  images
  n  anchors of one level: H * W * A
  N  anchors of all levels
  M  padded ground-truth boxes per image
  K  classes
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.geometry import boxes as box_ops
from detection.assign import matching
from detection.losses.box import smooth_l1
from detection.losses.classification import sigmoid_cross_entropy
from detection.losses.shares import share
from detection.models.settings import RPNLossSettings
from detection.structures import Proposals


def rpn_losses(
    keys: Array,
    logits: Sequence[Float[Array, "B n"]],
    deltas: Sequence[Float[Array, "B n 4"]],
    anchors: Sequence[Float[Array, "n 4"]],
    batch: Mapping[str, Array],
    options: RPNLossSettings,
    *,
    ignore_ioa: float,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Objectness and box losses, both divided by the number of sampled anchors.

    Args:
      keys: (B,) random keys, one an image.
      logits, deltas, anchors: per level, as in `detection.models.rpn.propose`.
      batch: image_valid (B,), gt_boxes (B,M,4) pixels, gt_valid (B,M); optional
        ignore_boxes and ignore_valid (`matching.ignored_background`), and class_known (B,K): an
        image of whose source some class is unknown has no background anchors, since any of them
        may hold an object of such a class.
      options: thresholds of `matching.match`, counts of `matching.sample`, `beta` of smooth L1.
      ignore_ioa: share of an anchor's area inside an ignore region above which it is no background.
      axis_name: device axis over which samples are counted.
    """
    all_anchors = jnp.concatenate(anchors, axis=0)
    ignore = matching.ignored_background(all_anchors, batch, ignore_ioa)
    if "class_known" in batch:
        ignore |= ~batch["class_known"].all(axis=-1, keepdims=True)

    def assign(key, gt_boxes, gt_valid, ignore):
        match = matching.match(
            all_anchors,
            jnp.ones(len(all_anchors), bool),
            gt_boxes,
            gt_valid,
            positive_iou=options.positive_iou,
            negative_iou=options.negative_iou,
            best_match_iou=options.best_match_iou,
            ignore=ignore,
        )
        index, positive, valid = matching.sample(
            key, match.positive, match.negative, options.num_samples, options.positive_fraction
        )
        sampled = all_anchors[index]
        matched_idx = matching.matched_idx(sampled, gt_boxes, gt_valid)
        return index, positive, valid, box_ops.encode(gt_boxes[matched_idx], sampled)

    index, positive, valid, target = jax.vmap(assign)(
        keys, batch["gt_boxes"], batch["gt_valid"], ignore
    )
    target = jax.lax.stop_gradient(target)
    valid &= batch["image_valid"][:, None]
    sampled_logits = jnp.take_along_axis(jnp.concatenate(logits, axis=1), index, axis=1)
    sampled_deltas = jnp.take_along_axis(jnp.concatenate(deltas, axis=1), index[..., None], axis=1)
    classification = sigmoid_cross_entropy(sampled_logits, positive)
    regression = smooth_l1(sampled_deltas - target, options.beta).sum(axis=-1)
    count = valid.sum()
    return {
        "rpn_class": share(classification, valid, count, axis_name),
        "rpn_box": share(regression, positive & valid, count, axis_name),
    }


def recall(
    proposals: Proposals, batch: Mapping[str, Array], *, axis_name: str | None = None
) -> Float[Array, ""]:
    """Share of the ground-truth boxes that a proposal overlaps by half (IoU) or more.

    It is an upper limit of what the second stage can detect.
    """
    overlaps = box_ops.iou(batch["gt_boxes"], proposals.boxes)
    covered = ((overlaps >= 0.5) & proposals.valid[:, None]).any(axis=-1).astype(jnp.float32)
    counted = batch["gt_valid"] & batch["image_valid"][:, None]
    return share(covered, counted, counted.sum(), axis_name)
