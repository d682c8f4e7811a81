"""Weakly supervised training: what the weak head learns of a batch, and what it lets others learn.

Paper section 5.7: "when encountering bounding-box level data, we use it to train the
fully-supervised detector and constrain the weakly supervisory detector; when encountering image
classification level data, we use it to train weakly supervised detector, and mine pseudo
ground-truth from weakly-supervised results to train the fully supervised detector".

Shape legend
  B  images
  P  proposals per image
  M  padded ground-truth boxes per image
  K  classes
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops
from detection.assign import matching, mining
from detection.assign.mining import Seeds
from detection.losses.shares import global_sum, share
from detection.losses.weak import presence_loss, refinement_loss
from detection.losses.weights import Term
from detection.models.settings import ModelSettings
from detection.models.weak_head import WeakOutput
from detection.structures import Proposals

_HIT = 0.5  # IoU from which a proposal is at an object


class ImageTruth(NamedTuple):
    """What is known of the classes of each image."""

    present: Bool[Array, "B K"]
    verified: Bool[Array, "B K"]  # the present classes are among them


def image_truth(labels: Int[Array, "B K"], ancestors: Bool[Array, "K K"]) -> ImageTruth:
    """Image-level truth of a batch, in the most special classes.

    An ancestor of a present class is present too, but the same region stands for both and its class
    is one of the two: it counts as unknown.

    Args:
      labels: 1 present, -1 absent, 0 unknown.
      ancestors: row c marks the ancestors of class c.
    """
    present, verified = labels > 0, labels != 0
    above = (present.astype(jnp.float32) @ ancestors.astype(jnp.float32)) > 0
    return ImageTruth(present & ~above, verified & ~above)


def best_proposals(proposals: Proposals, count: int) -> Proposals:
    """The first `count` proposals of each image, which are the best."""
    return jax.tree.map(lambda values: values[:, :count], proposals)


def weak_losses(
    output: WeakOutput,
    proposals: Proposals,
    truth: ImageTruth,
    batch: Mapping[str, Array],
    settings: ModelSettings,
    axis_name: str | None,
) -> dict[Term, Array]:
    """Losses of the head, unweighted, on photos with or without boxes.

    Args:
      output: of the head for `proposals`.
      proposals: of the head.
      truth: of the images.
      batch: image_valid; where the photos have boxes gt_boxes, gt_classes and gt_valid, optional
        ignore regions (`matching.ignored_background`) and class_known.
      settings: of the model.
      axis_name: device axis over which images and proposals are counted.
    """
    counted = proposals.valid & batch["image_valid"][:, None]
    images = counted.any(axis=1)
    terms = {
        Term("weak"): presence_loss(
            output.log_presence, truth.present, truth.verified, images, axis_name
        )
    }
    if not output.refined:
        return terms
    weak, total = settings.weak, jnp.zeros(())
    of_truth = None
    if "gt_boxes" in batch and weak.truth_seeds:
        of_truth = _of_truth(proposals, batch, settings.ignore_ioa)
    scores = output.scores
    for logits in output.refined:
        labels, weights = of_truth or _of_scores(scores, proposals, truth, weak.mining)
        total += refinement_loss(logits, labels, weights, counted, axis_name)
        scores = jax.nn.softmax(logits)[..., 1:]
    return terms | {Term("weak_refinement"): total}


def _of_scores(scores, proposals, truth, settings) -> tuple[Array, Array]:
    """Labels and weights of proposals by the best one of each present class."""

    def of_image(scores, boxes, valid, present):
        seeds = mining.top_seeds(scores, boxes, valid, present, settings.max_boxes)
        return mining.spread(seeds, boxes, settings.background_iou)

    scores = jax.lax.stop_gradient(scores)
    return jax.vmap(of_image)(scores, proposals.boxes, proposals.valid, truth.present)


def _of_truth(proposals, batch, ignore_ioa: float) -> tuple[Array, Array]:
    """The same by the ground-truth boxes, which all weigh 1, as background does where it is known
    to be some."""
    ones = batch["gt_valid"].astype(jnp.float32)
    truth = Seeds(batch["gt_boxes"], batch["gt_classes"], ones, batch["gt_valid"])
    labels, _ = jax.vmap(mining.spread, (0, 0, None))(truth, proposals.boxes, 0.0)
    unknown = matching.ignored_background(proposals.boxes, batch, ignore_ioa)
    if "class_known" in batch:
        unknown |= ~batch["class_known"].all(axis=-1, keepdims=True)
    return labels, jnp.where((labels == 0) & unknown, 0.0, 1.0)


def mine(
    output: WeakOutput, proposals: Proposals, truth: ImageTruth, settings: ModelSettings
) -> Seeds:
    """Boxes of the present classes of each image, with a leading axis of images."""
    mining_ = settings.weak.mining

    def of_image(scores, boxes, valid, present):
        return mining.mined_boxes(scores, boxes, valid, present, mining_)

    scores = output.best_scores()
    return jax.vmap(of_image)(scores, proposals.boxes, proposals.valid, truth.present)


def with_mined_truth(batch: Mapping[str, Array], mined: Seeds) -> dict[str, Array]:
    """The batch with mined boxes as ground truth, which also has weights: gt_weights (B,S)."""
    truth = (mined.boxes, mined.classes, mined.valid, mined.scores)
    names = ("gt_boxes", "gt_classes", "gt_valid", "gt_weights")
    return {**batch, **dict(zip(names, truth, strict=True))}


def ramp(step: Array, settings: ModelSettings) -> Float[Array, ""]:
    """Share of the weight of losses on mined boxes in a step: 0 before, then rising to 1."""
    mining_ = settings.weak.mining
    risen = (step - mining_.start_steps + 1) / max(mining_.ramp_steps, 1)
    return jnp.clip(risen, 0.0, 1.0)


def share_with_boxes(
    mined: Seeds, image_valid: Bool[Array, " B"], axis_name: str | None
) -> Float[Array, ""]:
    """Of the images of all devices, those with a mined box. Times a mean over the RoIs of these, it
    makes each image count as much as if the others had RoIs without loss."""
    found = global_sum((mined.valid.any(axis=1) & image_valid).sum(), axis_name)
    return found / jnp.maximum(global_sum(image_valid.sum(), axis_name), 1)


def mined_figures(
    mined: Seeds, image_valid: Bool[Array, " B"], axis_name: str | None
) -> dict[str, Float[Array, ""]]:
    """How many boxes are mined on an image, and their mean score."""
    counted = mined.valid & image_valid[:, None]
    ones = jnp.ones_like(mined.scores)
    return {
        "mined_per_image": share(ones, counted, image_valid.sum(), axis_name),
        "mined_score": share(mined.scores, counted, counted.sum(), axis_name),
    }


def right_boxes(
    mined: Seeds, batch: Mapping[str, Array], axis_name: str | None
) -> dict[str, Float[Array, ""]]:
    """Of the boxes that would be mined on photos with boxes, the share that is at an object of
    their class."""
    same = mined.classes[:, :, None] == batch["gt_classes"][:, None]
    hit = (box_ops.iou(mined.boxes, batch["gt_boxes"]) >= _HIT) & same & batch["gt_valid"][:, None]
    # Photos with image-level labels alone may be mixed in, of whose boxes nothing is known.
    images = batch["image_valid"] & batch["gt_valid"].any(axis=1)
    counted = mined.valid & images[:, None]
    right = hit.any(axis=-1).astype(jnp.float32)
    return {"mined_right": share(right, counted, counted.sum(), axis_name)}
