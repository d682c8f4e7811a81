"""The two-stage detector: Faster R-CNN, Cascade R-CNN, Decoupling Head, decoupled backbone.

Backbone and pyramids (`detection.models.two_stage`), proposal network (Ren et al. 2015; Lin et al.
2017), then the second stage of `detection.models.second_stage`.

Shape legend
  B     images of the global batch
  H, W  canvas, pixels
  M     padded ground-truth boxes
  K     classes
  P     proposals per image
  D     detections per image
  S     side of a mask (28)

Batch fields used (common.data.input): image uint8 (B,H,W,3), image_size float32 (B,2) content
height and width, image_valid bool (B,); in training also gt_boxes (B,M,4) pixels,
gt_classes (B,M) 0..K-1 and gt_valid (B,M), and where the data has them ignore_boxes (B,G,4) pixels
with ignore_valid (B,G), inside which nothing is background, class_known bool (B,K), the classes
that the annotations of an image cover, and labels (B,K), not 0 where a class was verified; with a
mask head gt_masks, gt_has_mask. A batch without gt_boxes is of photos with image-level labels
alone (`detection.models.weak_branch`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt16

from common.data.frequencies import ClassFrequencies
from common.geometry.nms import multiclass_nms
from common.masks.probability import quantise
from common.tables.hierarchy import Ancestors, ancestor_matrix
from detection.assign import anchors as anchor_ops
from detection.assign.mining import Seeds
from detection.losses.rpn import recall, rpn_losses
from detection.losses.weights import Term, weighted
from detection.models.box_refiner import BoxRefiner
from detection.models.mask_branch import predict_masks
from detection.models.rpn import RPNHead, propose
from detection.models.second_stage import RoIBranch, detect_stages, stage_losses
from detection.models.settings import ModelSettings, ProposalSettings
from detection.models.two_stage import TwoStage
from detection.models.weak_branch import (
    ImageTruth,
    best_proposals,
    image_truth,
    mine,
    mined_figures,
    ramp,
    right_boxes,
    share_with_boxes,
    weak_losses,
    with_mined_truth,
)
from detection.models.weak_head import WeakHead, WeakOutput
from detection.structures import Proposals, of_class


class FasterRCNN(TwoStage):
    """The detector. `build` makes one of the settings of a run."""

    def setup(self):
        super().setup()
        s = self.settings
        num_anchors = len(s.anchors.scales) * len(s.anchors.ratios)
        self.rpn_head = RPNHead(
            num_anchors, s.fpn_channels, s.rpn.num_convs, dtype=jnp.dtype(s.dtype)
        )
        if s.weak.is_on:
            w = s.weak
            self.weak_head = WeakHead(
                self.num_classes,
                w.class_stream,
                w.width,
                w.refinements,
                w.feature_gradient,
                dtype=jnp.dtype(s.dtype),
            )
            if self.is_mutable_collection("loss_state"):
                self.weak_steps = self.variable("loss_state", "weak_steps", _no_steps)

    def anchors(self, levels: Sequence[Array], canvas: tuple[int, ...]) -> list[Array]:
        """Anchors of each level, pixels; `canvas`: height and width."""
        a = self.settings.anchors
        shapes = [(level.shape[1], level.shape[2]) for level in levels]
        spacing = None
        if a.spacing == "canvas":
            spacing = [(canvas[0] // rows, canvas[1] // columns) for rows, columns in shapes]
        return anchor_ops.grid_anchors(
            shapes,
            self.strides,
            a.scales,
            a.ratios,
            a.ratio_convention,
            a.centre,
            a.rounded,
            spacing,
        )

    def losses(self, batch: Mapping[str, Array]) -> dict[str, dict[str, Float[Array, ""]]]:
        """{'losses': terms that are summed, 'monitor': figures that are only logged}.

        Both are this device's shares (`detection.losses.shares`). Needs the random stream
        'sampling'.
        """
        if self.settings.weak.is_on and "gt_boxes" not in batch:
            return self._losses_of_labels(batch)
        s, axis_name = self.settings, self.axis_name
        branches = self.read(batch, train=True)
        levels = branches[-1].levels
        anchors = self.anchors(levels, batch["image"].shape[1:3])
        logits, deltas = self.rpn_head(levels)

        num_images = batch["image"].shape[0]
        rpn_keys, roi_keys = self.image_keys(num_images), self.image_keys(num_images)
        rpn_terms = rpn_losses(
            rpn_keys,
            logits,
            deltas,
            anchors,
            batch,
            s.rpn.loss,
            ignore_ioa=s.ignore_ioa,
            axis_name=axis_name,
        )
        proposals = propose(
            jax.lax.stop_gradient(logits),
            jax.lax.stop_gradient(deltas),
            anchors,
            batch["image_size"],
            s.rpn.train_proposals,
        )
        roi_terms, monitor = stage_losses(
            branches, roi_keys, proposals, batch, s, self.class_losses(), axis_name
        )
        monitor["proposal_recall"] = recall(proposals, batch, axis_name=axis_name)
        terms = {Term(name): value for name, value in rpn_terms.items()} | roi_terms
        if s.weak.is_on:
            self._count_step()
            output, proposals, truth = self._weakly(branches, proposals, batch)
            terms |= weak_losses(output, proposals, truth, batch, s, axis_name)
            mined = self._mined(branches, batch, output, proposals, truth)
            monitor |= right_boxes(mined, batch, axis_name)
        return {"losses": weighted(terms, s), "monitor": monitor}

    def _losses_of_labels(self, batch: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """Of photos with image-level labels alone; the proposal network learns nothing of them.

        The names of what box heads learn of mined boxes begin with `mined_`. Of these the class
        losses remember nothing: what they keep between steps is of boxes that are true.
        """
        s, axis_name, images = self.settings, self.axis_name, batch["image_valid"]
        branches = self.read(batch, train=True)
        proposals = self._proposals(branches, batch, s.rpn.train_proposals)
        output, best, truth = self._weakly(branches, proposals, batch)
        losses = weighted(weak_losses(output, best, truth, batch, s, axis_name), s)
        mined = self._mined(branches, batch, output, best, truth)
        terms, monitor = stage_losses(
            branches,
            self.image_keys(len(images)),
            proposals,
            with_mined_truth(batch, mined),
            s,
            self.class_losses(read_only=True),
            axis_name,
        )
        weight = ramp(self._count_step(), s) * s.loss_weights.mined
        weight *= share_with_boxes(mined, images, axis_name)
        losses |= {f"mined_{name}": weight * x for name, x in weighted(terms, s).items()}
        monitor = {f"mined_{name}": value for name, value in monitor.items()}
        return {"losses": losses, "monitor": monitor | mined_figures(mined, images, axis_name)}

    def _weakly(
        self, branches: list[RoIBranch], proposals: Proposals, batch: Mapping[str, Array]
    ) -> tuple[WeakOutput, Proposals, ImageTruth]:
        """What the weak head says, of which proposals, and what it should say of the images."""
        weak = self.settings.weak
        proposals = best_proposals(proposals, weak.num_proposals)
        output = self.weak_head(branches[0].pool, proposals.boxes, proposals.valid)
        if self.is_initializing():  # parameters are made of batches without labels
            labels = jnp.zeros((len(batch["image_valid"]), self.num_classes), jnp.int8)
        else:
            labels = batch["labels"]
        ancestors = jnp.asarray(ancestor_matrix(self.ancestors or ((),) * self.num_classes))
        return output, proposals, image_truth(labels, ancestors)

    def _mined(
        self,
        branches: list[RoIBranch],
        batch: Mapping[str, Array],
        output: WeakOutput,
        proposals: Proposals,
        truth: ImageTruth,
    ) -> Seeds:
        """Boxes that stand for the classes of the images, cut off from the gradient."""
        mined = mine(output, proposals, truth, self.settings)
        if self.settings.weak.mining.refine:
            seeds = Proposals(mined.boxes, mined.valid)
            _, boxes = self._score(branches, batch, seeds)
            mined = mined._replace(boxes=of_class(boxes, mined.classes))
        return jax.lax.stop_gradient(mined)

    def _count_step(self) -> Int[Array, ""]:
        """The number of earlier steps of the run, of both kinds; counts this one."""
        if self.is_initializing() or not self.is_mutable_collection("loss_state"):
            return jnp.zeros((), jnp.int32)
        before = self.weak_steps.value
        self.weak_steps.value = before + 1
        return before

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Detections: boxes (B,D,4) canvas pixels, scores, classes 0..K-1 and valid, each (B,D).

        With a mask head also masks uint16 (B,D,S,S) inside the boxes, as `predict_masks` gives. Of
        a model with a weak head and a batch with `labels` (B,K), the boxes that are mined.
        """
        branches = self.read(batch, train=False)
        proposals = self._propose(branches, batch)
        if self.settings.weak.is_on and "labels" in batch:
            return self._mine(branches, batch, proposals)
        scores, boxes = self._score(branches, batch, proposals)
        valid = proposals.valid & batch["image_valid"][:, None]
        found = select_detections(boxes, scores, valid, self.settings)
        if branches[-1].masks is None:
            return found
        chosen = (found[name] for name in ("boxes", "classes", "valid"))
        return found | {"masks": quantise(predict_masks(branches[-1].masks, *chosen))}

    def predict_masks(
        self,
        batch: Mapping[str, Array],
        boxes: Float[Array, "B D 4"],
        classes: Int[Array, "B D"],
        valid: Bool[Array, "B D"],
    ) -> UInt16[Array, "B D S S"]:
        """Masks of given boxes: foreground probabilities inside each, 1 is `PROBABILITY_ONE`.

        Args:
          batch: images.
          boxes: canvas pixels, of any origin.
          classes: 0..K-1; of no effect where all classes share a mask.
          valid: which boxes are real; the others have zeros.
        """
        masks = self.read(batch, train=False)[-1].masks
        assert masks is not None, "the model has no mask head"
        valid &= batch["image_valid"][:, None]
        return quantise(predict_masks(masks, boxes, classes, valid))

    def propose_on(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Proposals of inference: boxes (B,P,4) canvas pixels, scores (B,P), valid (B,P)."""
        proposals = self._propose(self.read(batch, train=False), batch)
        assert proposals.logits is not None
        return {
            "boxes": proposals.boxes,
            "scores": jax.nn.sigmoid(proposals.logits),
            "valid": proposals.valid & batch["image_valid"][:, None],
        }

    def score_proposals(
        self, batch: Mapping[str, Array], boxes: Float[Array, "B P 4"], valid: Bool[Array, "B P"]
    ) -> dict[str, Array]:
        """The second stage on given RoIs, for test-time augmentation.

        Args:
          batch: images.
          boxes: RoIs, canvas pixels.
          valid: which of them are real.

        Returns:
          scores (B,P,K+1), probabilities with background first, and boxes (B,P,K,4) canvas pixels
          ((B,P,1,4) when class-agnostic).
        """
        branches = self.read(batch, train=False)
        scores, boxes = self._score(branches, batch, Proposals(boxes, valid))
        return {"scores": scores, "boxes": boxes}

    def _mine(
        self, branches: list[RoIBranch], batch: Mapping[str, Array], proposals: Proposals
    ) -> dict[str, Array]:
        output, proposals, truth = self._weakly(branches, proposals, batch)
        mined = self._mined(branches, batch, output, proposals, truth)
        valid = mined.valid & batch["image_valid"][:, None]
        return mined._replace(valid=valid)._asdict()

    def _propose(self, branches: list[RoIBranch], batch: Mapping[str, Array]) -> Proposals:
        return self._proposals(branches, batch, self.settings.rpn.test_proposals)

    def _proposals(
        self, branches: list[RoIBranch], batch: Mapping[str, Array], options: ProposalSettings
    ) -> Proposals:
        """Proposals from which no gradient comes back."""
        levels = branches[-1].levels
        logits, deltas = jax.lax.stop_gradient(self.rpn_head(levels))
        anchors = self.anchors(levels, batch["image"].shape[1:3])
        return propose(logits, deltas, anchors, batch["image_size"], options)

    def _score(
        self, branches: list[RoIBranch], batch: Mapping[str, Array], proposals: Proposals
    ) -> tuple[Array, Array]:
        scores, boxes = detect_stages(
            branches, proposals, batch["image_size"], self.settings.stages, self.classifier
        )
        assert scores is not None, "only the refiner's heads do not classify"
        return scores, boxes


def select_detections(
    boxes: Float[Array, "B P k 4"],
    scores: Float[Array, "B P K1"],
    valid: Bool[Array, "B P"],
    settings: ModelSettings,
) -> dict[str, Array]:
    """Detections of scored proposals: score threshold and NMS in each class, the best of all.

    Args:
      boxes: of each class, or of all together (k = 1).
      scores: probabilities, background first.
      valid: which proposals are real.
      settings: `detections`; `drop_background_rois` leaves out proposals whose best score is that
        of background, which is stricter than the score threshold (experts, paper section 5.4).

    Returns:
      boxes (B,D,4), scores, classes 0..K-1 and valid, each (B,D).
    """
    if settings.drop_background_rois:
        valid &= scores.argmax(axis=-1) != 0

    def select(boxes, scores, valid):
        return multiclass_nms(boxes, scores, valid, **vars(settings.detections))

    return jax.vmap(select)(boxes, scores[..., 1:], valid)


def _no_steps() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


def build(
    settings: ModelSettings,
    num_classes: int,
    axis_name: str | None = None,
    frequencies: ClassFrequencies | None = None,
    ancestors: Ancestors | None = None,
) -> FasterRCNN | BoxRefiner:
    """Makes the model of a run: the detector, or the refiner for heads that only regress.

    Args:
      settings: `config.model` as read.
      num_classes: K, from the dataset directory.
      axis_name: device axis over which losses are counted and synchronised batch norm averages;
        None when the model sees the whole batch.
      frequencies: of the classes in the training photos, of which training asks where
        `box_head.classifier.needs_frequencies`.
      ancestors: of each class, of which training asks where `settings.needs_ancestors`.
    """
    model = BoxRefiner if settings.refines else FasterRCNN
    return model(num_classes, settings, axis_name, frequencies, ancestors)
