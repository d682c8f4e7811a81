"""The second stage: one or more box heads in a row, each starting from the boxes of the one before.

One head is Faster R-CNN; more are Cascade R-CNN (Cai and Vasconcelos 2018). The paper's has four,
with IoU thresholds 0.5, 0.5, 0.6, 0.7 and weights 0.75, 1, 0.25, 0.25 (section 5.6). Where the
backbone is decoupled (section 5.2), every stage has two heads on pyramids of their own: the first
one's classes and the last one's boxes count. Heads that only regress (`RegressorHead`) have no
class losses and no scores. Mask heads (`detection.models.mask_branch`) are trained on the RoIs of
the last stage, or of every stage.

Shape legend
  B  images
  P  proposals per image
  R  sampled RoIs per image
  F  RoIs with a regressed box: the first F of the R, all positives among them; in inference F = P
  M  padded ground-truth boxes per image
  K  classes; scores have K + 1 columns, column 0 is background
  L  class logits of a RoI, see `detection.classifiers`
  k  boxes per RoI: K, or 1 when class-agnostic
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops
from detection.assign import matching
from detection.assign.rois import sample_rois
from detection.classifiers import RoIClassifier
from detection.losses import roi
from detection.losses.margin import margin_losses
from detection.losses.roi_class import ClassLosses, StageClassLosses
from detection.losses.weights import Term
from detection.models.mask_branch import MaskBranch, train_masks
from detection.models.settings import BoxHeadSettings, CascadeStage, ModelSettings, StageSettings
from detection.structures import HeadOutput, Pool, Proposals, RoITargets, of_class

Head = Callable[..., HeadOutput]  # of pool, boxes, train and, optionally, num_regressed


class RoIBranch(NamedTuple):
    """The features of a batch in one branch, and the heads that read RoIs of them.

    Attributes:
      levels: pyramid levels, finest first.
      pool: reads the features of boxes.
      heads: of each stage.
      masks: mask heads of each stage, in the last branch of a model that has them.
    """

    levels: Sequence[Array]
    pool: Pool
    heads: Sequence[Head]
    masks: MaskBranch | None = None


def stage_losses(
    branches: Sequence[RoIBranch],
    keys: Array,
    proposals: Proposals,
    batch: Mapping[str, Array],
    settings: ModelSettings,
    class_losses: ClassLosses | None = None,
    axis_name: str | None = None,
) -> tuple[dict[Term, Array], dict[str, Array]]:
    """Losses of all stages, unweighted, and figures to watch.

    The figures are the accuracy of the last stage, or how far each stage moves boxes towards the
    ground truth where heads do not classify.

    Args:
      branches: of the batch.
      keys: (B,) random keys, one an image.
      proposals: of the first stage.
      batch: ground truth: gt_boxes, gt_classes, gt_valid; image_size, image_valid; optional ignore
        regions and gt_weights, of mined boxes (`assign.rois.sample_rois`), class_known
        (`RoIClassifier.mask_unknown`) and labels; with mask heads gt_masks and gt_has_mask.
      settings: of the model.
      class_losses: of heads that classify.
      axis_name: device axis over which RoIs are counted.
    """
    terms: dict[Term, Array] = {}
    monitor: dict[str, Array] = {}
    stages, sample = settings.stages.each, settings.box_head.sample
    is_mined = "gt_weights" in batch
    background_iou = settings.weak.mining.background_iou if is_mined else None
    for index, stage in enumerate(stages):
        stage_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        targets = sample_rois(
            stage_keys,
            proposals,
            batch,
            iou=stage.iou,
            ignore_ioa=settings.ignore_ioa,
            background_iou=background_iou,
            **vars(sample),
        )
        last = index + 1 == len(stages)
        # Box losses are of positive RoIs, which come first; a next stage starts from all boxes.
        num_regressed = targets.boxes.shape[1]
        num_positive = matching.max_positives(num_regressed, sample.positive_fraction)
        if last:
            num_regressed = num_positive
        outputs = [
            branch.heads[index](branch.pool, targets.boxes, True, num_regressed)
            for branch in branches
        ]
        image_valid, classes = batch["image_valid"], None
        if class_losses is not None:
            classes = class_losses.of_stage(
                index, len(stages), targets, batch, stage_keys, axis_name
            )
            outputs = [classes.masked(output) for output in outputs]
        for number, output in enumerate(outputs):
            branch = number if len(branches) > 1 else None
            losses = head_losses(
                output, targets, image_valid, stage, settings.box_head, axis_name, classes, branch
            )
            terms |= {Term(name, branch, index): value for name, value in losses.items()}
        masks = None if is_mined else branches[-1].masks  # mined boxes have none
        if masks is not None and (mask_head := masks.heads[index]) is not None:
            positive = targets.first(num_positive)
            loss, iou = train_masks(masks, mask_head, positive, batch, axis_name)
            # The only mask head is no part of a stage, and has no stage's weight.
            of_stage = index if settings.mask_head.stages == "all" else None
            terms[Term("mask", None, of_stage)] = loss
            monitor["mask_iou"] = iou
        classifier = None if classes is None else classes.classifier
        best_class = _best_class(outputs[0], classifier)
        boxes = _refine(outputs[-1], best_class, targets, stage, batch["image_size"])
        counted = (targets, image_valid, axis_name)
        if classifier is None or outputs[0].logits is None:
            suffix = f"_stage{index + 1}" if len(stages) > 1 else ""
            figures = roi.mean_overlaps(boxes, *counted)
            monitor |= {name + suffix: value for name, value in figures.items()}
        else:
            monitor |= roi.accuracy(classifier.prediction(outputs[0].logits), *counted)
        if not last:  # refined RoIs, without copies of the ground truth
            valid = targets.valid & ~targets.is_gt & box_ops.is_valid(boxes)
            proposals = Proposals(boxes, valid)
    return terms, monitor


def head_losses(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    stage: CascadeStage,
    settings: BoxHeadSettings,
    axis_name: str | None,
    classes: StageClassLosses | None = None,
    branch: int | None = None,
) -> dict[str, Array]:
    """Losses of one head; a Decoupling Head adds its sibling's and the margin losses.

    Args:
      output: of the head, masked where classes are unknown.
      targets: of its RoIs.
      image_valid: images that count.
      stage: of the head.
      settings: `config.model.box_head`.
      axis_name: device axis over which RoIs are counted.
      classes: class losses of the stage; None: the head does not classify.
      branch: of the head, None where there is only one.
    """

    def losses_of(output: HeadOutput, prefix: str) -> dict[str, Array]:
        terms = {}
        if classes is not None and output.logits is not None:
            terms["box_class"] = classes.share(f"{prefix}box_class", branch, output.logits)
        terms["box_regression"] = roi.box_loss(
            output,
            targets,
            image_valid,
            stds=stage.stds,
            axis_name=axis_name,
            **vars(settings.loss),
        )
        return {prefix + name: value for name, value in terms.items()}

    terms = losses_of(output, "")
    if output.sibling is not None and classes is not None:
        terms |= losses_of(output.sibling, "sibling_")
        terms |= margin_losses(
            output,
            targets,
            image_valid,
            classes.classifier,
            stds=stage.stds,
            axis_name=axis_name,
            **vars(settings.margin),
        )
    return terms


def detect_stages(
    branches: Sequence[RoIBranch],
    proposals: Proposals,
    image_size: Float[Array, "B 2"],
    settings: StageSettings,
    classifier: RoIClassifier | None = None,
) -> tuple[Float[Array, "B P K1"] | None, Float[Array, "B P k 4"]]:
    """Class probabilities (column 0 background; None without classifiers) and boxes.

    Args:
      branches: of the batch.
      proposals: of the first stage.
      image_size: content height, width, pixels; boxes are clipped to it.
      settings: `average` is the weighted mean of "probability" or of "logit" over the stages;
        `box_stage` the index of the stage whose boxes are returned.
      classifier: of heads that classify.
    """
    logits, boxes = [], []
    stages = settings.each
    for index, stage in enumerate(stages):
        outputs = [branch.heads[index](branch.pool, proposals.boxes, False) for branch in branches]
        logits.append(outputs[0].logits)
        boxes.append(_decode(outputs[-1], stage, image_size))
        if index + 1 < len(stages):
            best_class = _best_class(outputs[0], classifier)
            proposals = Proposals(of_class(boxes[-1], best_class), proposals.valid)
    scores = None
    if classifier is not None:
        classified = [x for x in logits if x is not None]
        scores = _mean_scores(classified, stages, settings.average, classifier)
    return scores, boxes[settings.box_stage]


def _mean_scores(
    logits: Sequence[Float[Array, "B P L"]],
    stages: Sequence[CascadeStage],
    average: str,
    classifier: RoIClassifier,
) -> Float[Array, "B P K1"]:
    total = sum(stage.score_weight for stage in stages)
    parts = [classifier.probabilities(x) if average == "probability" else x for x in logits]
    weights = [stage.score_weight / total for stage in stages]
    mean = jnp.asarray(sum(w * part for w, part in zip(weights, parts, strict=True)))
    return mean if average == "probability" else classifier.probabilities(mean)


def _best_class(output: HeadOutput, classifier: RoIClassifier | None) -> Int[Array, "B R"] | None:
    """The best class of each RoI, background apart; None where the head does not classify."""
    if classifier is None or output.logits is None:
        return None
    return classifier.best_class(output.logits)


def _decode(output: HeadOutput, stage: CascadeStage, image_size: Array) -> Float[Array, "B F k 4"]:
    boxes = box_ops.decode(output.deltas, output.references[:, :, None], stage.stds)
    return jax.vmap(box_ops.clip)(boxes.reshape(boxes.shape[0], -1, 4), image_size).reshape(
        boxes.shape
    )


def _refine(
    output: HeadOutput,
    best_class: Int[Array, "B R"] | None,
    targets: RoITargets,
    stage: CascadeStage,
    image_size: Array,
) -> Float[Array, "B F 4"]:
    """Refined RoIs, cut off from the gradient.

    A positive RoI takes the box of its label, background that of its best class.
    """
    boxes = _decode(output, stage, image_size)
    classes = best_class
    if classes is not None:
        labels = targets.labels[:, : boxes.shape[1]]
        classes = jnp.where(labels > 0, labels - 1, classes[:, : boxes.shape[1]])
    return jax.lax.stop_gradient(of_class(boxes, classes))
