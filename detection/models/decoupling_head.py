"""Decoupling Head (paper section 2; published as TSD, Song et al. 2020).

Class and box are read at different places: every bin of the classification features is shifted by
an offset of its own (eq. 3), the box features by one offset for the whole RoI (eq. 4), and each has
a tower of its own. In training a plain ("sibling") head runs beside, which the decoupled one has to
beat by a margin (`detection.losses.margin`); inference uses the decoupled branches only.

Shape legend
  B  images
  R  RoIs per image
  F  the first RoIs of each image, whose boxes are regressed; in inference F = R
  S  pooled side (7)
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.io.errors import UserError
from detection.classifiers import RoIClassifier
from detection.models.box_head import DENSE_INIT, TwoFCHead, classify, dense_layers, regress
from detection.structures import HeadOutput, Pool

# Last layers of the offset branches; "release" is what the authors' code starts from.
OFFSET_INITS = {
    "small": nn.initializers.normal(0.01),
    "zero": nn.initializers.zeros,
    "release": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
}


class DecouplingHead(nn.Module):
    """Decoupled classification and regression with learned sampling offsets.

    Attributes:
      classifier: what its class logits are.
      width: of the fully connected layers of the three towers.
      offset_width: of the layers that offsets come from.
      gamma: offsets are learned in units of gamma x RoI size.
      offset_init: a key of `OFFSET_INITS`.
      class_agnostic: one box a RoI instead of one a class.
      dtype: of matmuls.
    """

    classifier: RoIClassifier
    width: int = 1024
    offset_width: int = 256
    gamma: float = 0.1
    offset_init: str = "small"
    class_agnostic: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        pool: Pool,
        boxes: Float[Array, "B R 4"],
        train: bool,
        num_regressed: int | None = None,
    ) -> HeadOutput:
        """Decoupled output; with `train` also the sibling's.

        Logits of all RoIs, deltas of the first `num_regressed` of each image (None: of all).

        Raises:
          UserError: unknown `offset_init`.
        """
        if self.offset_init not in OFFSET_INITS:
            raise UserError(
                f"config.model.box_head.offsets.offset_init: found {self.offset_init!r}, "
                f"expected one of {', '.join(OFFSET_INITS)}"
            )
        num_images, num_rois = boxes.shape[:2]
        num_regressed = num_regressed or num_rois
        pooled = pool(boxes)
        bin_offsets, box_offset = self._offsets(pooled)

        features = pool(boxes, bin_offsets).reshape(num_images * num_rois, -1)
        for_class = dense_layers(features, self.width, self.dtype, "class_")
        logits = classify(for_class, num_images, self.classifier, self.dtype)

        regressed, box_offset = boxes[:, :num_regressed], box_offset[:, :num_regressed]
        features = pool(regressed, box_offset[:, :, None, None])
        features = features.reshape(num_images * num_regressed, -1)
        for_box = dense_layers(features, self.width, self.dtype, "box_")
        num_deltas = 1 if self.class_agnostic else self.classifier.num_classes
        deltas = regress(for_box, num_images, num_deltas, self.dtype)

        sibling = None
        if train or self.is_initializing():
            head = TwoFCHead(
                self.classifier, self.width, self.class_agnostic, self.dtype, name="sibling"
            )
            sibling = head(lambda _: pooled, boxes, train, num_regressed)
        return HeadOutput(logits, deltas, shifted(regressed, box_offset), sibling)

    def _offsets(
        self, pooled: Float[Array, "B R S S C"]
    ) -> tuple[Float[Array, "B R S S 2"], Float[Array, "B R 2"]]:
        """Shifts (x, y) of each bin and of the RoI, as fractions of its width and height."""
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
