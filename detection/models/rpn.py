"""Region proposal network: class-free boxes from anchors.

Shape legend
  B  images
  L  pyramid levels
  A  anchors per location
  N  anchors of all levels
  n  anchors of one level: H * W * A
  P  proposals per image
  M  padded ground-truth boxes
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry import boxes as box_ops
from common.geometry.nms import nms_mask
from common.nn.layers.conv import Conv
from detection.assign import matching
from detection.losses import elementwise


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first."""

    boxes: Float[Array, "B P 4"]
    valid: Bool[Array, "B P"]
    logits: Float[Array, "B P"] | None = None  # objectness, where the network made the boxes


class RPNHead(nn.Module):
    """3x3 convolution, ReLU, then one objectness logit and four deltas per anchor."""

    num_anchors: int
    channels: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, levels: Sequence[Float[Array, "B H W C"]]
    ) -> tuple[list[Float[Array, "B n"]], list[Float[Array, "B n 4"]]]:
        """Logits and deltas of each level, in anchor order of `detection.assign.anchors`."""
        init = nn.initializers.normal(0.01)
        options = dict(use_bias=True, dtype=self.dtype, kernel_init=init)
        shared = Conv(self.channels, (3, 3), name="conv", **options)
        objectness = Conv(self.num_anchors, (1, 1), name="objectness", **options)
        regression = Conv(4 * self.num_anchors, (1, 1), name="deltas", **options)
        logits, deltas = [], []
        for x in levels:
            x = nn.relu(shared(x))
            batch = x.shape[0]
            logits.append(objectness(x).reshape(batch, -1).astype(jnp.float32))
            deltas.append(regression(x).reshape(batch, -1, 4).astype(jnp.float32))
        return logits, deltas


def propose(
    logits: Sequence[Float[Array, "B n"]],
    deltas: Sequence[Float[Array, "B n 4"]],
    anchors: Sequence[Float[Array, "n 4"]],
    image_size: Float[Array, "B 2"],
    *,
    pre_nms: int,
    post_nms: int,
    nms_iou: float,
    min_size: float = 0.0,
) -> Proposals:
    """The best boxes: top `pre_nms` of each level, NMS within it, top `post_nms` over levels.

    Args:
      logits: objectness of each level.
      deltas: box regression of each level (standard deviations 1).
      anchors: of each level, pixels.
      image_size: content height, width; boxes are clipped to it.
      pre_nms: candidates kept per level.
      post_nms: proposals kept per image (P).
      nms_iou: overlap above which the weaker candidate of a level is dropped.
      min_size: shortest allowed side, pixels.
    """
    boxes, scores = [], []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        count = min(pre_nms, level_logits.shape[1])
        top, index = jax.lax.top_k(level_logits, count)
        chosen = jnp.take_along_axis(level_deltas, index[..., None], axis=1)
        decoded = box_ops.clip(box_ops.decode(chosen, level_anchors[index]), image_size)
        # All levels share one padded shape, so that one batched NMS serves the pyramid.
        missing = pre_nms - count
        boxes.append(jnp.pad(decoded, ((0, 0), (0, missing), (0, 0))))
        scores.append(jnp.pad(top, ((0, 0), (0, missing)), constant_values=-jnp.inf))
    boxes = jnp.stack(boxes, axis=1)  # (B, L, pre_nms, 4)
    scores = jnp.stack(scores, axis=1)
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = (sides > min_size).all(axis=-1) & jnp.isfinite(scores)
    suppress = jax.vmap(jax.vmap(nms_mask, (0, 0, 0, None)), (0, 0, 0, None))
    keep = suppress(boxes, scores, valid, nms_iou)
    batch = boxes.shape[0]
    scores = jnp.where(keep, scores, -jnp.inf).reshape(batch, -1)
    count = min(post_nms, scores.shape[1])
    top, index = jax.lax.top_k(scores, count)
    boxes = jnp.take_along_axis(boxes.reshape(batch, -1, 4), index[..., None], axis=1)
    return Proposals(boxes, jnp.isfinite(top), top)


def recall(
    proposals: Proposals,
    truth: Float[Array, "B M 4"],
    truth_valid: Bool[Array, "B M"],
    image_valid: Bool[Array, " B"],
    *,
    iou: float = 0.5,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Share of the ground-truth boxes that a proposal overlaps by at least `iou`.

    An upper limit of what the second stage can find.
    """
    overlaps = box_ops.iou(truth, proposals.boxes)
    covered = ((overlaps >= iou) & proposals.valid[:, None]).any(axis=-1).astype(jnp.float32)
    wanted = truth_valid & image_valid[:, None]
    return elementwise.share(covered, wanted, wanted.sum(), axis_name)


def rpn_losses(
    keys: Array,
    logits: Sequence[Float[Array, "B n"]],
    deltas: Sequence[Float[Array, "B n 4"]],
    anchors: Sequence[Float[Array, "n 4"]],
    batch: Mapping[str, Array],
    *,
    ignore_ioa: float = 0.5,
    positive_iou: float = 0.7,
    negative_iou: float = 0.3,
    best_match_iou: float = 0.3,
    num_samples: int = 256,
    positive_fraction: float = 0.5,
    beta: float = 1.0 / 9.0,
    allowed_border: float | None = None,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Objectness and box losses over sampled anchors, both divided by the number of samples.

    Args:
      keys: (B,) random keys, one an image.
      logits, deltas, anchors: per level, as in `propose`.
      batch: image_size (B,2), image_valid (B,), gt_boxes (B,M,4) pixels, gt_valid (B,M); optional
        ignore_boxes and ignore_valid (`matching.ignored_background`), and class_known (B,K): an
        image of whose source some class is unknown has no background anchors, since any of them
        may hold an object of such a class.
      ignore_ioa: share of an anchor's area inside an ignore box from which on it is no background.
      positive_iou, negative_iou, best_match_iou: see `matching.match`.
      num_samples: anchors trained on per image.
      positive_fraction: largest share of positives among them.
      beta: where smooth L1 turns linear.
      allowed_border: anchors that leave the image by more than this many pixels are not trained on;
        None trains on all (detectron2).
      axis_name: device axis over which samples are counted.
    """
    logits = jnp.concatenate(logits, axis=1)
    deltas = jnp.concatenate(deltas, axis=1)
    anchors = jnp.concatenate(anchors, axis=0)

    ignore = matching.ignored_background(anchors, batch, ignore_ioa)
    if "class_known" in batch:
        ignore |= ~batch["class_known"].all(axis=-1, keepdims=True)

    def assign(key, size, boxes, boxes_valid, ignore):
        inside = jnp.ones(anchors.shape[0], bool)
        if allowed_border is not None:
            limit = jnp.concatenate([size[::-1], size[::-1]])
            low, high = anchors >= -allowed_border, anchors <= limit + allowed_border
            inside = (low & high).all(axis=-1)
        found = matching.match(
            anchors,
            inside,
            boxes,
            boxes_valid,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            best_match_iou=best_match_iou,
            ignore=ignore,
        )
        index, positive, valid = matching.sample(
            key, found.positive, found.negative, num_samples, positive_fraction
        )
        sampled = anchors[index]
        answer = matching.best_truth(sampled, boxes, boxes_valid)
        target = box_ops.encode(boxes[answer], sampled)
        return index, positive, valid, target

    index, positive, valid, target = jax.vmap(assign)(
        keys, batch["image_size"], batch["gt_boxes"], batch["gt_valid"], ignore
    )
    target = jax.lax.stop_gradient(target)
    valid &= batch["image_valid"][:, None]
    logits = jnp.take_along_axis(logits, index, axis=1)
    deltas = jnp.take_along_axis(deltas, index[..., None], axis=1)
    classification = elementwise.sigmoid_cross_entropy(logits, positive)
    regression = elementwise.smooth_l1(deltas - target, beta).sum(axis=-1)
    count = valid.sum()
    return {
        "rpn_class": elementwise.share(classification, valid, count, axis_name),
        "rpn_box": elementwise.share(regression, positive & valid, count, axis_name),
    }
