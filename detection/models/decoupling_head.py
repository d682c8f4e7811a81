"""Decoupling Head (paper section 2; published as TSD, Song et al. 2020).

Class and box are read at different places: every bin of the classification features is shifted by
an offset of its own (eq. 3), the box features by one offset for the whole region (eq. 4), and each
has a tower of its own. In training a plain ("sibling") head runs beside, which the decoupled one
has to beat by a margin (Controllable Margin Loss, eq. 5 and 6); inference uses the decoupled
branches only.

Shape legend
  B  images
  R  regions
  F  the first of them, whose boxes are regressed: R in inference
  K  classes; logits have K + 1 columns, column 0 is background
  S  pooled side (7)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry import boxes as box_ops
from common.io.errors import UserError
from detection.losses import elementwise
from detection.models.box_head import (
    DENSE_INIT,
    HeadOutput,
    Pool,
    RoITargets,
    TwoFCHead,
    classify,
    of_class,
    regress,
    two_fc,
)

# Last layers of the offset branches; "release" is what the authors' code starts from.
OFFSET_INITS = {
    "small": nn.initializers.normal(0.01),
    "zero": nn.initializers.zeros,
    "release": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
}


class DecouplingHead(nn.Module):
    """Decoupled classification and regression with learned sampling offsets.

    Attributes:
      num_classes: K.
      width: of the fully connected layers of the three towers.
      offset_width: of the layers that offsets come from.
      gamma: offsets are learned in units of gamma x region size.
      offset_init: a key of `OFFSET_INITS`.
      class_agnostic: one box a region instead of one a class.
      dtype: of matmuls.
    """

    num_classes: int
    width: int = 1024
    offset_width: int = 256
    gamma: float = 0.1
    offset_init: str = "small"
    class_agnostic: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pool: Pool, boxes: Float[Array, "B R 4"], train: bool, num_boxes: int | None = None
    ) -> HeadOutput:
        """Decoupled output; with `train` also the sibling's.

        Classes of all regions, boxes of the first `num_boxes` of each image (None: of all).

        Raises:
          UserError: unknown `offset_init`.
        """
        if self.offset_init not in OFFSET_INITS:
            raise UserError(
                f"config.model.box_head.offsets.offset_init: found {self.offset_init!r}, "
                f"expected one of {', '.join(OFFSET_INITS)}"
            )
        num_images, num_regions = boxes.shape[:2]
        num_boxes = num_boxes or num_regions
        pooled = pool(boxes)
        bin_offsets, box_offset = self._offsets(pooled)

        features = pool(boxes, bin_offsets).reshape(num_images * num_regions, -1)
        for_class = two_fc(features, self.width, self.dtype, "class_")
        logits = classify(for_class, num_images, self.num_classes, self.dtype)

        regressed, box_offset = boxes[:, :num_boxes], box_offset[:, :num_boxes]
        features = pool(regressed, box_offset[:, :, None, None])
        features = features.reshape(num_images * num_boxes, -1)
        for_box = two_fc(features, self.width, self.dtype, "box_")
        num_deltas = 1 if self.class_agnostic else self.num_classes
        deltas = regress(for_box, num_images, num_deltas, self.dtype)

        sibling = None
        if train or self.is_initializing():
            head = TwoFCHead(
                self.num_classes, self.width, self.class_agnostic, self.dtype, name="sibling"
            )
            sibling = head(lambda _: pooled, boxes, train, num_boxes)
        return HeadOutput(logits, deltas, shifted(regressed, box_offset), sibling)

    def _offsets(
        self, pooled: Float[Array, "B R S S C"]
    ) -> tuple[Float[Array, "B R S S 2"], Float[Array, "B R 2"]]:
        """Shifts (x, y) of each bin and of the region, as fractions of its width and height."""
        shape, side = pooled.shape[:2], pooled.shape[2]

        def dense(width, name, init=DENSE_INIT):
            return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        last = OFFSET_INITS[self.offset_init]
        x = nn.relu(dense(self.offset_width, "offset_fc")(pooled.reshape(shape[0] * shape[1], -1)))
        for_bins = nn.relu(dense(self.offset_width, "bin_offset_fc")(x))
        for_box = nn.relu(dense(self.offset_width, "box_offset_fc")(x))
        bins = dense(2 * side * side, "bin_offsets", last)(for_bins).astype(jnp.float32)
        box = dense(2, "box_offset", last)(for_box).astype(jnp.float32)
        # All x shifts come before all y shifts, as in the authors' layer.
        bins = jnp.moveaxis(bins.reshape(*shape, 2, side, side), 2, -1)
        return self.gamma * bins, self.gamma * box.reshape(*shape, 2)


def shifted(boxes: Float[Array, "B F 4"], offset: Float[Array, "B F 2"]) -> Float[Array, "B F 4"]:
    """Boxes moved by fractions (x, y) of their width and height."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes + jnp.tile(offset * size, 2)


def margin_losses(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    *,
    stds: tuple[float, float, float, float],
    class_margin: float,
    box_margin: float,
    clip: bool,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Controllable Margin Loss (eq. 5 and 6): the decoupled branch beats the sibling by a margin.

    relu(sg(sibling) + margin - decoupled), for the probability of the region's label (background
    included) and, on positive regions, for the IoU of the decoded box with its ground truth. An
    image without positives counts as one region of loss 0, as in the authors' code.

    Args:
      output: of a `DecouplingHead` in training; no region beyond its boxes is positive.
      targets: from `sample_rois`.
      image_valid: images that count.
      stds: of the deltas.
      class_margin: by how much the probability has to be higher (m_c).
      box_margin: by how much the IoU has to be higher (m_r).
      clip: margins shrink so that no more than 1 is asked for (the authors' code); without, the
        equations as printed.
      axis_name: device axis over which regions are counted.
    """
    valid = targets.valid & image_valid[:, None]
    regressed = targets.first(output.deltas.shape[1])
    positive = regressed.valid & image_valid[:, None] & (regressed.labels > 0)
    trained = image_valid & positive.any(axis=1)

    def probability(logits):
        label = jax.nn.one_hot(targets.labels, logits.shape[-1], dtype=jnp.float32)
        return (jax.nn.softmax(logits) * label).sum(axis=-1)

    def overlap(head):
        deltas = of_class(head.deltas, regressed.labels - 1)
        boxes = box_ops.decode(deltas, head.references, stds)
        return box_ops.iou(boxes[:, :, None], regressed.truth[:, :, None])[..., 0, 0]

    def hinge(measure, margin):
        sibling = jax.lax.stop_gradient(measure(output.sibling))
        if clip:
            margin = jnp.minimum(margin, 1.0 - sibling)
        return sibling + margin

    classification = nn.relu(
        hinge(lambda head: probability(head.logits), class_margin) - probability(output.logits)
    )
    localisation = nn.relu(hinge(overlap, box_margin) - overlap(output))
    without = (image_valid & ~trained).sum()
    terms = {}
    for name, values, wanted in (
        ("margin_class", classification, valid & trained[:, None]),
        ("margin_box", localisation, positive),
    ):
        terms[name] = elementwise.share(values, wanted, wanted.sum() + without, axis_name)
    return terms
