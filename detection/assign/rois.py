"""Samples the RoIs that a stage of box heads is trained on.

Shape legend
  B  images
  P  proposals per image
  M  padded ground-truth boxes per image
  R  sampled RoIs per image
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from detection.assign import matching
from detection.structures import Proposals, RoITargets


def sample_rois(
    keys: Array,
    proposals: Proposals,
    batch: Mapping[str, Array],
    *,
    iou: float,
    ignore_ioa: float,
    num_samples: int,
    positive_fraction: float,
    background_iou: float | None = None,
) -> RoITargets:
    """Samples from proposals and the ground-truth boxes themselves.

    Boxes of IoU >= `iou` with some ground-truth box are positive, all others are background, except
    those in ignore regions, which are not sampled. Positive RoIs come first, at most
    `matching.max_positives` of them.

    Args:
      keys: (B,) random keys, one an image.
      proposals: of this stage.
      batch: gt_boxes (B,M,4), gt_classes (B,M), gt_valid (B,M), image_valid (B,), the ignore
        regions of `matching.ignored_background`, and optional gt_weights (B,M): a RoI has the
        weight of the box that it overlaps most.
      iou: from which a box is positive.
      ignore_ioa: share of a box's area inside an ignore region above which it is no background.
      num_samples: RoIs sampled per image (R).
      positive_fraction: largest share of positives among them.
      background_iou: IoU with some ground-truth box from which a box may be background, where the
        ground truth is not all that there is; None: any box may.
    """
    num_gt = batch["gt_boxes"].shape[1]
    boxes = jnp.concatenate([batch["gt_boxes"], proposals.boxes], axis=1)
    valid = jnp.concatenate([batch["gt_valid"], proposals.valid], axis=1)
    ignore = matching.ignored_background(boxes, batch, ignore_ioa)

    def sample(key, boxes, valid, ignore, gt_boxes, gt_classes, gt_valid):
        match = matching.match(
            boxes,
            valid,
            gt_boxes,
            gt_valid,
            positive_iou=iou,
            negative_iou=iou,
            ignore=ignore,
            background_iou=background_iou,
        )
        index, positive, slot_valid = matching.sample(
            key, match.positive, match.negative, num_samples, positive_fraction
        )
        rois = boxes[index]
        matched_idx = matching.matched_idx(rois, gt_boxes, gt_valid)
        labels = jnp.where(positive, gt_classes[matched_idx] + 1, 0)
        return RoITargets(
            rois, labels, gt_boxes[matched_idx], slot_valid, index < num_gt, matched_idx
        )

    ground_truth = (batch[name] for name in ("gt_boxes", "gt_classes", "gt_valid"))
    targets = jax.vmap(sample)(keys, boxes, valid, ignore, *ground_truth)
    if "gt_weights" in batch:
        weights = jnp.take_along_axis(batch["gt_weights"], targets.matched_idx, axis=1)
        targets = targets._replace(weights=weights)
    return jax.tree.map(jax.lax.stop_gradient, targets)
