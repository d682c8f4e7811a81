"""The two-stage detector: Faster R-CNN, Cascade R-CNN, Decoupling Head, decoupled backbone.

Backbone and pyramids (`detection.models.two_stage`), proposal network (Ren et al. 2015; Lin et al.
2017), then the second stage of `detection.models.second_stage`.

Shape legend
  B     images of the global batch
  H, W  canvas, pixels
  M     padded ground-truth boxes
  K     classes
  D     detections per image

Batch fields used (common.data.input): image uint8 (B,H,W,3), image_size float32 (B,2) content
height and width, image_valid bool (B,); in training also gt_boxes (B,M,4) pixels,
gt_classes (B,M) 0..K-1 and gt_valid (B,M), and where the data has them ignore_boxes (B,G,4) pixels
with ignore_valid (B,G), inside which nothing is background, and class_known bool (B,K), the
classes that the annotations of an image cover.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry.nms import multiclass_nms
from detection.assign import anchors as anchor_ops
from detection.models import rpn as rpn_ops
from detection.models import second_stage
from detection.models.box_refiner import BoxRefiner
from detection.models.settings import ModelSettings
from detection.models.two_stage import TwoStage


class FasterRCNN(TwoStage):
    """The detector. `build` makes one of the settings of a run."""

    def setup(self):
        super().setup()
        s = self.settings
        num_anchors = len(s.anchors.scales) * len(s.anchors.ratios)
        self.rpn_head = rpn_ops.RPNHead(num_anchors, s.fpn_channels, dtype=jnp.dtype(s.dtype))

    def anchors(self, levels: list[Array]) -> list[Array]:
        """Anchors of each level, pixels."""
        a = self.settings.anchors
        shapes = [level.shape[1:3] for level in levels]
        return anchor_ops.grid_anchors(
            shapes, self.strides, a.scales, a.ratios, a.ratio_convention, a.centre
        )

    def losses(self, batch: Mapping[str, Array]) -> dict[str, dict[str, Float[Array, ""]]]:
        """{'losses': terms that are summed, 'monitor': figures that are only logged}.

        Both are this device's shares (`detection.losses.elementwise`). Needs the random stream
        'sampling'.
        """
        s, axis_name = self.settings, self.axis_name
        pyramids = self.pyramids(batch, train=True)
        anchors = self.anchors(pyramids[-1])
        logits, deltas = self.rpn_head(pyramids[-1])

        num_images = batch["image"].shape[0]
        rpn_keys, roi_keys = self.image_keys(num_images), self.image_keys(num_images)
        terms = rpn_ops.rpn_losses(
            rpn_keys,
            logits,
            deltas,
            anchors,
            batch,
            ignore_ioa=s.ignore_ioa,
            axis_name=axis_name,
            **vars(s.rpn.loss),
        )
        weights = vars(s.loss_weights)
        terms = {name: weights[name] * value for name, value in terms.items()}
        proposals = rpn_ops.propose(
            *jax.lax.stop_gradient((logits, deltas)),
            anchors,
            batch["image_size"],
            **vars(s.rpn.train_proposals),
        )
        box_terms, monitor = second_stage.stage_losses(
            self.heads(),
            [self.pool(levels) for levels in pyramids],
            roi_keys,
            proposals,
            batch,
            self.stages,
            self._branch_weights(),
            sample=dict(vars(s.box_head.sample), ignore_ioa=s.ignore_ioa),
            loss=vars(s.box_head.loss),
            margin=vars(s.box_head.margin),
            axis_name=axis_name,
        )
        monitor["proposal_recall"] = rpn_ops.recall(
            proposals,
            batch["gt_boxes"],
            batch["gt_valid"],
            batch["image_valid"],
            axis_name=axis_name,
        )
        return {"losses": terms | box_terms, "monitor": monitor}

    def _branch_weights(self) -> list[dict[str, float]]:
        """Weights of the box heads' losses by name, for each branch."""
        s = self.settings
        if not s.split_after:
            return [vars(s.loss_weights)]

        def lowered(of_class):
            return {
                name: weight * (s.low_weight if name.endswith("class") == of_class else 1.0)
                for name, weight in vars(s.loss_weights).items()
            }

        return [lowered(of_class=False), lowered(of_class=True)]

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Detections: boxes (B,D,4) canvas pixels, scores, classes 0..K-1 and valid, each (B,D)."""
        s = self.settings
        pyramids = self.pyramids(batch, train=False)
        proposals = self._propose(pyramids, batch)
        scores, boxes = self._score(pyramids, batch, proposals)
        valid = proposals.valid & batch["image_valid"][:, None]
        if s.drop_background_rois:
            # Stricter than the score threshold, for experts (paper section 5.4).
            valid &= scores.argmax(axis=-1) != 0

        def select(boxes, scores, valid):
            return multiclass_nms(boxes, scores, valid, **vars(s.detections))

        return jax.vmap(select)(boxes, scores[..., 1:], valid)

    def propose_on(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Proposals of inference: boxes (B,P,4) canvas pixels, scores (B,P), valid (B,P)."""
        found = self._propose(self.pyramids(batch, train=False), batch)
        return {
            "boxes": found.boxes,
            "scores": jax.nn.sigmoid(found.logits),
            "valid": found.valid & batch["image_valid"][:, None],
        }

    def score_proposals(
        self, batch: Mapping[str, Array], boxes: Float[Array, "B P 4"], valid: Bool[Array, "B P"]
    ) -> dict[str, Array]:
        """The second stage on given regions, for test-time augmentation.

        Args:
          batch: images.
          boxes: regions, canvas pixels.
          valid: which of them are real.

        Returns:
          scores (B,P,K+1), probabilities with background first, and boxes (B,P,K,4) canvas pixels
          ((B,P,1,4) when class-agnostic).
        """
        pyramids = self.pyramids(batch, train=False)
        scores, boxes = self._score(pyramids, batch, rpn_ops.Proposals(boxes, valid))
        return {"scores": scores, "boxes": boxes}

    def _propose(
        self, pyramids: list[list[Array]], batch: Mapping[str, Array]
    ) -> rpn_ops.Proposals:
        logits, deltas = self.rpn_head(pyramids[-1])
        return rpn_ops.propose(
            logits,
            deltas,
            self.anchors(pyramids[-1]),
            batch["image_size"],
            **vars(self.settings.rpn.test_proposals),
        )

    def _score(
        self, pyramids: list[list[Array]], batch: Mapping[str, Array], proposals: rpn_ops.Proposals
    ) -> tuple[Array, Array]:
        stages = self.settings.stages
        return second_stage.detect_stages(
            self.heads(),
            [self.pool(levels) for levels in pyramids],
            proposals,
            batch["image_size"],
            self.stages,
            average=stages.average,
            box_stage=stages.box_stage,
        )


def build(
    settings: ModelSettings, num_classes: int, axis_name: str | None = None
) -> FasterRCNN | BoxRefiner:
    """Makes the model of a run: the detector, or the refiner for heads that only regress.

    Args:
      settings: `config.model` as read.
      num_classes: K, from the dataset directory.
      axis_name: device axis over which losses are counted and synchronised batch norm averages;
        None when the model sees the whole batch.
    """
    model = BoxRefiner if settings.refines else FasterRCNN
    return model(num_classes, settings, axis_name)
