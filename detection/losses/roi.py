"""Box loss of a head on sampled RoIs, and figures to watch.

Shape legend
  B  images
  R  sampled RoIs per image
  F  the first RoIs, with a regressed box; all positives are among them
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops
from detection.losses.box import smooth_l1
from detection.losses.shares import share
from detection.structures import HeadOutput, RoITargets, of_class


def box_loss(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    *,
    stds: tuple[float, float, float, float],
    beta: float,
    normaliser: str,
    target_gradient: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Smooth L1 on the deltas of the matched class.

    Args:
      output: of a head on `targets.boxes`.
      targets: from `sample_rois`.
      image_valid: images that count.
      stds: standard deviations by which deltas are divided.
      beta: where smooth L1 turns linear.
      normaliser: box loss is divided by the number of "sampled" or of "positive" RoIs.
      target_gradient: lets the box loss move learned references through its target too, as in the
        authors' code of the Decoupling Head.
      axis_name: device axis over which RoIs are counted.
    """
    regressed = targets.first(output.deltas.shape[1])
    positive = regressed.positive(image_valid)
    references = output.references
    if not target_gradient:
        references = jax.lax.stop_gradient(references)
    target = box_ops.encode(regressed.gt_boxes, references, stds)
    deltas = of_class(output.deltas, regressed.labels - 1)
    regression = smooth_l1(deltas - target, beta).sum(axis=-1)
    counted = positive if normaliser == "positive" else targets.counted(image_valid)
    return share(regressed.weighted(regression), positive, counted.sum(), axis_name)


def mean_overlaps(
    boxes: Float[Array, "B F 4"],
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Mean IoU of positive RoIs with their ground-truth boxes before, and as `boxes` after.

    RoIs that are ground-truth boxes themselves do not count.
    """
    targets = targets.first(boxes.shape[1])
    counted = targets.positive(image_valid) & ~targets.is_gt

    def mean_iou(of):
        iou = box_ops.iou(of[:, :, None], targets.gt_boxes[:, :, None])[..., 0, 0]
        return share(iou, counted, counted.sum(), axis_name)

    return {"iou_before": mean_iou(targets.boxes), "iou_after": mean_iou(boxes)}


def accuracy(
    prediction: Int[Array, "B R"],
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Share of positive RoIs whose class is right, and the number of positives per image.

    `prediction` is in terms of `RoITargets.labels`.
    """
    positive = targets.positive(image_valid)
    right = (prediction == targets.labels).astype(jnp.float32)
    ones = jnp.ones_like(right)
    return {
        "positive_accuracy": share(right, positive, positive.sum(), axis_name),
        "positives_per_image": share(ones, positive, image_valid.sum(), axis_name),
    }
