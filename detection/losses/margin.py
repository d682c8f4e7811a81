"""Controllable Margin Loss of the Decoupling Head (paper section 2, eq. 5 and 6).

Shape legend
  B  images
  R  sampled RoIs per image
  F  the first RoIs, with a regressed box; all positives are among them
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry import boxes as box_ops
from detection.classifiers import RoIClassifier
from detection.losses.shares import share
from detection.structures import HeadOutput, RoITargets, of_class


def margin_losses(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    classifier: RoIClassifier,
    *,
    stds: tuple[float, float, float, float],
    class_margin: float,
    box_margin: float,
    clip: bool,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """The decoupled branch has to beat the sibling head by a margin.

    relu(sg(sibling) + margin - decoupled), for the probability of the RoI's label (background
    included, if there is a probability of background) and, on positive RoIs, for the IoU of the
    decoded box with its ground-truth box. An image without positives counts as one RoI of loss 0,
    as in the authors' code.

    Args:
      output: of a `DecouplingHead` in training.
      targets: from `sample_rois`.
      image_valid: images that count.
      classifier: of the heads.
      stds: of the deltas.
      class_margin: by how much the probability has to be higher (m_c).
      box_margin: by how much the IoU has to be higher (m_r).
      clip: margins shrink so that no more than 1 is asked for (the authors' code); without, the
        equations as printed.
      axis_name: device axis over which RoIs are counted.
    """
    assert output.sibling is not None, "margins need the sibling head, which runs in training"
    with_class = targets.counted(image_valid)
    if not classifier.has_background:
        with_class &= targets.labels > 0
    regressed = targets.first(output.deltas.shape[1])
    positive = regressed.positive(image_valid)
    with_positives = positive.any(axis=1)

    def probability(head):
        scores = classifier.probabilities(head.logits)
        label = jax.nn.one_hot(targets.labels, scores.shape[-1], dtype=jnp.float32)
        return (scores * label).sum(axis=-1)

    def overlap(head):
        deltas = of_class(head.deltas, regressed.labels - 1)
        boxes = box_ops.decode(deltas, head.references, stds)
        return box_ops.iou(boxes[:, :, None], regressed.gt_boxes[:, :, None])[..., 0, 0]

    def hinge(measure, margin):
        sibling = jax.lax.stop_gradient(measure(output.sibling))
        if clip:
            margin = jnp.minimum(margin, 1.0 - sibling)
        return nn.relu(sibling + margin - measure(output))

    without = (image_valid & ~with_positives).sum()
    terms = {}
    for name, values, counted in (
        (
            "margin_class",
            targets.weighted(hinge(probability, class_margin)),
            with_class & with_positives[:, None],
        ),
        ("margin_box", regressed.weighted(hinge(overlap, box_margin)), positive),
    ):
        terms[name] = share(values, counted, counted.sum() + without, axis_name)
    return terms
