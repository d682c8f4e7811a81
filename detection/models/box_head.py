"""Box heads: classify each region and refine its box.

Shape legend
  B  images
  R  regions (sampled RoIs in training, proposals in inference)
  F  the first of them, whose boxes are regressed: R in inference
  P  proposals
  M  padded ground-truth boxes
  K  classes; logits have K + 1 columns, column 0 is background
  k  boxes regressed per region: K (one a class) or 1 (class-agnostic)
  S  pooled side (7)
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops
from detection.assign import matching
from detection.losses import classification, elementwise
from detection.models.rpn import Proposals

# Features (B,R,S,S,C) of boxes (B,R,4), with optional shifts of each bin (B,R,S,S,2).
Pool = Callable[..., Array]

DENSE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
CLASSIFIER_INIT = nn.initializers.normal(0.01)
REGRESSOR_INIT = nn.initializers.normal(0.001)


class RoITargets(NamedTuple):
    """Sampled regions of a batch and what each should become."""

    boxes: Float[Array, "B R 4"]
    labels: Int[Array, "B R"]  # 0 background, class + 1 otherwise
    truth: Float[Array, "B R 4"]  # ground-truth box of a positive region
    valid: Bool[Array, "B R"]
    is_truth: Bool[Array, "B R"]  # the region is a ground-truth box itself

    def first(self, count: int) -> "RoITargets":
        """The first regions of each image."""
        return RoITargets(*(values[:, :count] for values in self))


class HeadOutput(NamedTuple):
    """What a head says of its regions: a class of each, a box of the first of them."""

    logits: Float[Array, "B R K1"] | None  # None: the head does not classify
    deltas: Float[Array, "B F k 4"]
    references: Float[Array, "B F 4"]  # boxes that the deltas are relative to
    sibling: "HeadOutput | None" = None  # of the plain head that trains beside a Decoupling Head

    def masked(self, class_known: Bool[Array, "B K"]) -> "HeadOutput":
        """The output without the logits of classes that are unknown in an image.

        An unknown class then has probability 0, and neither its logits nor what they are made of
        get a gradient: a region of that image is no negative of the class.
        """
        if self.logits is None:
            return self
        sibling = None if self.sibling is None else self.sibling.masked(class_known)
        logits = classification.mask_unknown(self.logits, class_known)
        return self._replace(logits=logits, sibling=sibling)


def sample_rois(
    keys: Array,
    proposals: Proposals,
    batch: Mapping[str, Array],
    *,
    iou: float,
    ignore_ioa: float,
    num_samples: int,
    positive_fraction: float,
) -> RoITargets:
    """Draws the regions to train on from proposals and the ground-truth boxes themselves.

    Regions of IoU >= `iou` with some ground truth are positive, all others background, but for
    those in ignore regions, which are not drawn. Positive ones come first, at most
    `matching.max_positives` of them.

    Args:
      keys: (B,) random keys, one an image.
      proposals: of this stage.
      batch: gt_boxes (B,M,4), gt_classes (B,M), gt_valid (B,M), image_valid (B,), and the ignore
        regions of `matching.ignored_background`.
      iou: from which a region is positive.
      ignore_ioa: share of a region's area inside an ignore box from which on it is no background.
      num_samples: regions drawn per image (R).
      positive_fraction: largest share of positives among them.
    """
    num_truth = batch["gt_boxes"].shape[1]
    boxes = jnp.concatenate([batch["gt_boxes"], proposals.boxes], axis=1)
    valid = jnp.concatenate([batch["gt_valid"], proposals.valid], axis=1)
    ignore = matching.ignored_background(boxes, batch, ignore_ioa)

    def draw(key, boxes, valid, ignore, truth, classes, truth_valid):
        found = matching.match(
            boxes, valid, truth, truth_valid, positive_iou=iou, negative_iou=iou, ignore=ignore
        )
        index, positive, slot_valid = matching.sample(
            key, found.positive, found.negative, num_samples, positive_fraction
        )
        sampled = boxes[index]
        answer = matching.best_truth(sampled, truth, truth_valid)
        labels = jnp.where(positive, classes[answer] + 1, 0)
        return RoITargets(sampled, labels, truth[answer], slot_valid, index < num_truth)

    truth = (batch[name] for name in ("gt_boxes", "gt_classes", "gt_valid"))
    targets = jax.vmap(draw)(keys, boxes, valid, ignore, *truth)
    return jax.tree.map(jax.lax.stop_gradient, targets)


def two_fc(x: Float[Array, "N F"], width: int, dtype: jnp.dtype, prefix: str = "") -> Array:
    """Two fully connected layers with ReLU, made in the scope of the calling module."""
    for name in ("fc1", "fc2"):
        dense = nn.Dense(width, dtype=dtype, kernel_init=DENSE_INIT, name=prefix + name)
        x = nn.relu(dense(x))
    return x


def classify(
    x: Float[Array, "N D"], num_images: int, num_classes: int, dtype: jnp.dtype
) -> Float[Array, "B R K1"]:
    """Layer `classifier`, made in the scope of the calling module."""
    dense = nn.Dense(num_classes + 1, dtype=dtype, kernel_init=CLASSIFIER_INIT, name="classifier")
    return dense(x).reshape(num_images, -1, num_classes + 1).astype(jnp.float32)


def regress(
    x: Float[Array, "N D"], num_images: int, num_classes: int, dtype: jnp.dtype
) -> Float[Array, "B F k 4"]:
    """Layer `regressor`, made in the scope of the calling module; class-agnostic: 1 class."""
    dense = nn.Dense(4 * num_classes, dtype=dtype, kernel_init=REGRESSOR_INIT, name="regressor")
    return dense(x).reshape(num_images, -1, num_classes, 4).astype(jnp.float32)


class TwoFCHead(nn.Module):
    """The plain ("sibling") head: class and box from the same two fully connected layers."""

    num_classes: int
    width: int = 1024
    class_agnostic: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pool: Pool, boxes: Float[Array, "B R 4"], train: bool, num_boxes: int | None = None
    ) -> HeadOutput:
        """Classes of all regions, boxes of the first `num_boxes` of each image (None: of all)."""
        num_images, num_regions = boxes.shape[:2]
        num_boxes = num_boxes or num_regions
        # One (B * R, features) matrix: rank-3 dense layers are slower on CPU.
        x = pool(boxes).reshape(num_images * num_regions, -1)
        x = two_fc(x, self.width, self.dtype)
        logits = classify(x, num_images, self.num_classes, self.dtype)
        x = x.reshape(num_images, num_regions, -1)[:, :num_boxes].reshape(-1, self.width)
        num_deltas = 1 if self.class_agnostic else self.num_classes
        deltas = regress(x, num_images, num_deltas, self.dtype)
        return HeadOutput(logits, deltas, boxes[:, :num_boxes])


class RegressorHead(nn.Module):
    """Box only, the same for all classes, from two fully connected layers."""

    width: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pool: Pool, boxes: Float[Array, "B R 4"], train: bool, num_boxes: int | None = None
    ) -> HeadOutput:
        """Boxes of the first `num_boxes` regions of each image (None: of all)."""
        boxes = boxes[:, :num_boxes]
        num_images, num_regions = boxes.shape[:2]
        x = pool(boxes).reshape(num_images * num_regions, -1)
        x = two_fc(x, self.width, self.dtype)
        return HeadOutput(None, regress(x, num_images, 1, self.dtype), boxes)


def best_class(output: HeadOutput) -> Int[Array, "B R"] | None:
    """The best class of each region, background apart; None where the head does not classify."""
    return None if output.logits is None else output.logits[..., 1:].argmax(axis=-1)


def of_class(
    values: Float[Array, "B F k 4"], index: Int[Array, "B F"] | None
) -> Float[Array, "B F 4"]:
    """The row of each region's class, zeros where `index` is -1; the only row if there is one."""
    if values.shape[2] == 1:
        return values[:, :, 0]
    chosen = jax.nn.one_hot(index, values.shape[2], dtype=values.dtype)
    return (values * chosen[..., None]).sum(axis=2)


def box_head_losses(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    *,
    stds: tuple[float, float, float, float],
    beta: float,
    normaliser: str,
    target_gradient: bool = False,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Softmax cross-entropy over K + 1, if the head classifies, and smooth L1 on the deltas.

    Deltas are those of the true class.

    Args:
      output: of a head on `targets.boxes`; no region beyond its boxes is positive.
      targets: from `sample_rois`.
      image_valid: images that count.
      stds: standard deviations by which deltas are divided.
      beta: where smooth L1 turns linear.
      normaliser: box loss is divided by the number of "sampled" or of "positive" regions.
      target_gradient: lets the box loss move learned references through its target too, as in the
        authors' code of the Decoupling Head.
      axis_name: device axis over which regions are counted.
    """
    valid = targets.valid & image_valid[:, None]
    count = valid.sum()
    regressed = targets.first(output.deltas.shape[1])
    positive = regressed.valid & image_valid[:, None] & (regressed.labels > 0)
    references = output.references
    if not target_gradient:
        references = jax.lax.stop_gradient(references)
    wanted = box_ops.encode(regressed.truth, references, stds)
    chosen = of_class(output.deltas, regressed.labels - 1)
    regression = elementwise.smooth_l1(chosen - wanted, beta).sum(axis=-1)
    terms = {}
    if output.logits is not None:
        cross_entropy = elementwise.softmax_cross_entropy(output.logits, targets.labels)
        terms["box_class"] = elementwise.share(cross_entropy, valid, count, axis_name)
    if normaliser == "positive":
        count = positive.sum()
    return terms | {"box_regression": elementwise.share(regression, positive, count, axis_name)}


def head_overlaps(
    boxes: Float[Array, "B F 4"],
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Mean IoU with the truth of positive regions, before and after they became `boxes`.

    Copies of the ground truth do not count.
    """
    targets = targets.first(boxes.shape[1])
    positive = targets.valid & image_valid[:, None] & (targets.labels > 0) & ~targets.is_truth

    def mean_iou(of):
        iou = box_ops.iou(of[:, :, None], targets.truth[:, :, None])[..., 0, 0]
        return elementwise.share(iou, positive, positive.sum(), axis_name)

    return {"iou_before": mean_iou(targets.boxes), "iou_after": mean_iou(boxes)}


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
        "positive_accuracy": elementwise.share(right, positive, positive.sum(), axis_name),
        "positives_per_image": elementwise.share(ones, positive, image_valid.sum(), axis_name),
    }
