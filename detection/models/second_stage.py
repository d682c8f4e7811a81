"""The second stage: one or more box heads in a row, each starting from the boxes of the one before.

One head is Faster R-CNN; more are Cascade R-CNN (Cai and Vasconcelos 2018). The paper's has four,
with IoU thresholds 0.5, 0.5, 0.6, 0.7 and weights 0.75, 1, 0.25, 0.25 (section 5.6). Where the
backbone is decoupled (section 5.2), every stage has two heads on pyramids of their own: the first
one's classes and the last one's boxes count. Heads that only regress (`RegressorHead`) have no
class losses and no scores.

Shape legend
  B  images
  R  regions
  F  the first of them, whose boxes are regressed
  P  proposals
  M  padded ground-truth boxes
  K  classes
  k  boxes per region: K, or 1 when class-agnostic
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.geometry import boxes as box_ops
from detection.assign import matching
from detection.models import box_head
from detection.models.box_head import HeadOutput, Pool, RoITargets
from detection.models.decoupling_head import margin_losses
from detection.models.rpn import Proposals
from detection.models.settings import StageSettings

Head = Callable[..., HeadOutput]  # of Pool, boxes, train and, optionally, num_boxes


@dataclasses.dataclass(frozen=True)
class Stage:
    """Constants of one stage; the fields of `config.model.stages` at one index.

    Attributes:
      iou: overlap with the ground truth from which a region is positive.
      stds: standard deviations by which its deltas are divided.
      loss_weight: of all its losses.
      score_weight: share of its class scores in the result.
    """

    iou: float
    stds: tuple[float, float, float, float]
    loss_weight: float
    score_weight: float


def read_stages(settings: StageSettings) -> tuple[Stage, ...]:
    """The stages of `config.model.stages`, whose lists have one entry a stage."""
    lists = (settings.iou, settings.stds, settings.loss_weights, settings.score_weights)
    return tuple(Stage(*values) for values in zip(*lists, strict=True))


def stage_losses(
    heads: Sequence[Sequence[Head]],
    pools: Sequence[Pool],
    keys: Array,
    proposals: Proposals,
    batch: Mapping[str, Array],
    stages: Sequence[Stage],
    weights: Sequence[Mapping[str, float]],
    *,
    sample: Mapping[str, Any],
    loss: Mapping[str, Any],
    margin: Mapping[str, Any],
    axis_name: str | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Losses of all stages, weighted, and monitoring figures.

    The figures are the accuracy of the last stage, or how far each stage moves boxes towards the
    truth where heads do not classify.

    Args:
      heads: of each branch, of each stage.
      pools: of each branch.
      keys: (B,) random keys, one an image.
      proposals: of the first stage.
      batch: ground truth: gt_boxes, gt_classes, gt_valid; image_size, image_valid; optional ignore
        regions (`box_head.sample_rois`) and class_known (`HeadOutput.masked`).
      stages: constants of each.
      weights: of the losses by name, for each branch.
      sample: options of `box_head.sample_rois`.
      loss: options of `box_head.box_head_losses`.
      margin: options of `margin_losses`.
      axis_name: device axis over which regions are counted.
    """
    terms: dict[str, Array] = {}
    monitor: dict[str, Array] = {}
    for index, stage in enumerate(stages):
        targets = box_head.sample_rois(
            jax.vmap(jax.random.fold_in, (0, None))(keys, index),
            proposals,
            batch,
            iou=stage.iou,
            **sample,
        )
        last = index + 1 == len(stages)
        # Box losses are of positive regions, which come first; a next stage starts from all boxes.
        num_boxes = targets.boxes.shape[1]
        if last:
            num_boxes = matching.max_positives(num_boxes, sample["positive_fraction"])
        outputs = [
            branch[index](pool, targets.boxes, True, num_boxes)
            for branch, pool in zip(heads, pools, strict=True)
        ]
        if "class_known" in batch:
            outputs = [output.masked(batch["class_known"]) for output in outputs]
        of_stage = f"_stage{index + 1}" if len(stages) > 1 else ""
        for branch, (output, by_name) in enumerate(zip(outputs, weights, strict=True)):
            found = head_losses(
                output, targets, batch["image_valid"], stage, loss, margin, axis_name
            )
            suffix = f"_{branch + 1}" if len(outputs) > 1 else ""
            suffix += of_stage
            for name, value in found.items():
                terms[name + suffix] = stage.loss_weight * by_name.get(name, 1.0) * value
        boxes = _refine(outputs, targets, stage, batch["image_size"])
        counted = (targets, batch["image_valid"], axis_name)
        if outputs[0].logits is None:
            figures = box_head.head_overlaps(boxes, *counted)
            monitor |= {name + of_stage: value for name, value in figures.items()}
        else:
            monitor = box_head.head_accuracy(outputs[0].logits, *counted)
        if not last:  # refined regions, without copies of the ground truth
            valid = targets.valid & ~targets.is_truth & box_ops.is_valid(boxes)
            proposals = Proposals(boxes, valid)
    return terms, monitor


def head_losses(
    output: HeadOutput,
    targets: RoITargets,
    image_valid: Bool[Array, " B"],
    stage: Stage,
    loss: Mapping[str, Any],
    margin: Mapping[str, Any],
    axis_name: str | None,
) -> dict[str, Array]:
    """Losses of one head; a Decoupling Head adds its sibling's and the margin losses."""
    common = dict(stds=stage.stds, axis_name=axis_name)
    terms = box_head.box_head_losses(output, targets, image_valid, **common, **loss)
    if output.sibling is not None:
        beside = box_head.box_head_losses(output.sibling, targets, image_valid, **common, **loss)
        terms |= {f"sibling_{name}": value for name, value in beside.items()}
        terms |= margin_losses(output, targets, image_valid, **common, **margin)
    return terms


def detect_stages(
    heads: Sequence[Sequence[Head]],
    pools: Sequence[Pool],
    proposals: Proposals,
    image_size: Float[Array, "B 2"],
    stages: Sequence[Stage],
    *,
    average: str,
    box_stage: int,
) -> tuple[Float[Array, "B P K1"] | None, Float[Array, "B P k 4"]]:
    """Class probabilities (column 0 background; None without classifiers) and boxes.

    Args:
      heads, pools, stages: as in `stage_losses`.
      proposals: of the first stage.
      image_size: content height, width, pixels; boxes are clipped to it.
      average: weighted mean of "probability" or of "logit" over the stages.
      box_stage: index of the stage whose boxes are returned; -1 is the last.
    """
    logits, boxes = [], []
    for index, stage in enumerate(stages):
        outputs = [
            branch[index](pool, proposals.boxes, False)
            for branch, pool in zip(heads, pools, strict=True)
        ]
        logits.append(outputs[0].logits)
        boxes.append(_decode(outputs[-1], stage, image_size))
        if index + 1 < len(stages):
            chosen = box_head.of_class(boxes[-1], box_head.best_class(outputs[0]))
            proposals = Proposals(chosen, proposals.valid)
    scores = None if logits[0] is None else _mean_scores(logits, stages, average)
    return scores, boxes[box_stage]


def _mean_scores(
    logits: Sequence[Float[Array, "B P K1"]], stages: Sequence[Stage], average: str
) -> Float[Array, "B P K1"]:
    total = sum(stage.score_weight for stage in stages)
    parts = [jax.nn.softmax(x) if average == "probability" else x for x in logits]
    mean = sum(s.score_weight / total * part for s, part in zip(stages, parts, strict=True))
    return mean if average == "probability" else jax.nn.softmax(mean)


def _decode(output: HeadOutput, stage: Stage, image_size: Array) -> Float[Array, "B F k 4"]:
    boxes = box_ops.decode(output.deltas, output.references[:, :, None], stage.stds)
    return jax.vmap(box_ops.clip)(boxes.reshape(boxes.shape[0], -1, 4), image_size).reshape(
        boxes.shape
    )


def _refine(
    outputs: Sequence[HeadOutput], targets: RoITargets, stage: Stage, image_size: Array
) -> Float[Array, "B F 4"]:
    """Refined regions, cut off from the gradient.

    A positive region takes the box of its label, background that of its best class.
    """
    boxes = _decode(outputs[-1], stage, image_size)
    chosen = box_head.best_class(outputs[0])
    if chosen is not None:
        labels = targets.labels[:, : boxes.shape[1]]
        chosen = jnp.where(labels > 0, labels - 1, chosen[:, : boxes.shape[1]])
    return jax.lax.stop_gradient(box_head.of_class(boxes, chosen))
