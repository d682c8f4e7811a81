"""Cascade of regressors that moves given boxes onto their objects: no proposals, no classes.

The paper's "refined detection": boxes of an ensemble's detections table are refined before they are
segmented, and keep their scores. Every stage (IoU 0.5, 0.6, 0.7 by default) starts from the boxes
of the one before and has a box for all classes together.

Shape legend
  B  images of the global batch
  M  padded ground-truth boxes
  P  padded boxes of the table
  J  jittered copies of the ground truth

Batch fields used (common.data.input): those of `detection.models.faster_rcnn`, and proposals
(B,P,4) pixels with proposal_valid (B,P).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry import boxes as box_ops
from detection.losses.weights import weighted
from detection.models.second_stage import detect_stages, stage_losses
from detection.models.two_stage import TwoStage
from detection.structures import Proposals


class BoxRefiner(TwoStage):
    """The refiner. Its settings are those of configs/detection/r50_refine.py."""

    def losses(self, batch: Mapping[str, Array]) -> dict[str, dict[str, Float[Array, ""]]]:
        """{'losses': terms that are summed, 'monitor': figures that are only logged}.

        Both are this device's shares (`detection.losses.shares`). Trained on are the table's
        boxes, the ground truth and, with `truth_jitter.copies`, moved copies of it.
        """
        s = self.settings
        boxes, valid = batch["proposals"], batch["proposal_valid"]
        jittered = jitter(
            self.image_keys(len(boxes)),
            batch["gt_boxes"],
            batch["gt_valid"],
            batch["image_size"],
            **vars(s.truth_jitter),
        )
        proposals = Proposals(
            jnp.concatenate([boxes, jittered.boxes], axis=1),
            jnp.concatenate([valid, jittered.valid], axis=1),
        )
        branches, keys = self.read(batch, train=True), self.image_keys(len(boxes))
        terms, monitor = stage_losses(branches, keys, proposals, batch, s, axis_name=self.axis_name)
        return {"losses": weighted(terms, s), "monitor": monitor}

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Boxes (B,P,4), canvas pixels, in the order of the proposals, and which were refined.

        Where `refined` (B,P) is false, the box is the proposal itself: padding, boxes without area,
        and those that the regressor would move out of the image.
        """
        proposals = Proposals(batch["proposals"], batch["proposal_valid"])
        _, boxes = detect_stages(
            self.read(batch, train=False), proposals, batch["image_size"], self.settings.stages
        )
        boxes = boxes[:, :, 0]
        refined = proposals.valid & batch["image_valid"][:, None] & box_ops.is_valid(boxes)
        return {"boxes": jnp.where(refined[..., None], boxes, proposals.boxes), "refined": refined}


def jitter(
    keys: Array,
    boxes: Float[Array, "B M 4"],
    valid: Bool[Array, "B M"],
    image_size: Float[Array, "B 2"],
    *,
    copies: int,
    shift: float,
    scale: float,
) -> Proposals:
    """Randomly moved copies of boxes, (B, J = copies * M), clipped to the image.

    Args:
      keys: (B,) random keys, one an image.
      boxes: pixels.
      valid: which of them are real.
      image_size: content height, width, pixels.
      copies: of each box.
      shift: standard deviation of the centre's move, in sides of the box.
      scale: standard deviation of the logarithm of each side's factor.
    """
    spread = jnp.array([shift, shift, scale, scale])
    repeated = jnp.tile(boxes, (1, copies, 1))
    shape = repeated.shape[1:]
    deltas = jax.vmap(lambda key: jax.random.normal(key, shape))(keys) * spread
    moved = box_ops.clip(box_ops.decode(deltas, repeated), image_size)
    return Proposals(moved, jnp.tile(valid, (1, copies)) & box_ops.is_valid(moved))
