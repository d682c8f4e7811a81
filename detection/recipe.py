"""A config for a dataset: what is known of the set, and what is chosen for it with a reason each.

The choices start from the recipes that were measured (docs/results.md): those of `r50` for
accelerators, those of `quickstart` and `photos_lite0` for CPUs. They are a start, not a search.

Shape legend: N training photos, M boxes of them, K classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from common.metrics.names import Metric
from detection.assign.anchor_selection import AnchorSet

_SMALLEST = 16.0  # pixels of a small object's side on the canvas, from which it is found well
_CPU_SIDES = (256, 320, 384, 448, 512)
_SIDES = (512, 640, 800)
_LONGEST = 1.67  # sides of a canvas


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What a dataset is like.

    Attributes:
      directory: of the dataset.
      train_split, eval_split: names of its splits; eval_split "" where there is none.
      sizes: (N, 2) height and width of the training photos, or of a random part of them.
      num_photos: N, of all.
      boxes_per_photo: of each photo with boxes, or of a random part.
      sides: (M,) sqrt(width * height) of their boxes as a share of the photo's.
      photos_of_class: (K,) training photos with a class.
      has_masks: whether boxes have masks.
      metric: that fits the dataset.
    """

    directory: str
    train_split: str
    eval_split: str
    sizes: Int[np.ndarray, "N 2"]
    num_photos: int
    boxes_per_photo: Int[np.ndarray, " N"]
    sides: Float[np.ndarray, " M"]
    photos_of_class: Int[np.ndarray, " K"]
    has_masks: bool
    metric: Metric

    @property
    def num_classes(self) -> int:
        return len(self.photos_of_class)


@dataclasses.dataclass(frozen=True)
class Device:
    """What is at hand.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      kind: to show.
      count: of all processes.
      memory_gib: of one; 0: not known.
    """

    platform: str
    kind: str
    count: int
    memory_gib: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """Fields of the config, by their paths, and why they are so."""

    fields: Mapping[str, Any]
    why: str


def choose_canvas(facts: Facts, device: Device) -> Choice:
    """The smallest canvas that shows small objects large enough."""
    short_sides, aspects = facts.sizes.min(axis=1), facts.sizes.max(1) / facts.sizes.min(axis=1)
    small = float(np.percentile(facts.sides, 10)) if len(facts.sides) else 0.1
    aspect = min(float(np.percentile(aspects, 90)), _LONGEST)
    sides = _CPU_SIDES if device.platform == "cpu" else _SIDES
    # A share of sqrt(width * height), which is short * sqrt(aspect).
    pixels = [small * side * math.sqrt(float(np.median(aspects))) for side in sides]
    place = next((i for i, value in enumerate(pixels) if value >= _SMALLEST), len(sides) - 1)
    short = sides[place]
    long = max(short, -(-int(short * aspect) // 32) * 32)
    native = int(np.median(short_sides))
    return Choice(
        {"data.canvas": (short, long)},
        f"The photos' short sides are {native} pixels in the middle; at {short} a small object "
        f"(smaller than 9 of 10) is {pixels[place]:.0f} pixels wide and high, {_SMALLEST:.0f} is "
        f"aimed at{'' if pixels[place] >= _SMALLEST else ', which more pixels would cost'}. Nine "
        f"of ten photos are no longer than {aspect:.2f} times their short side.",
    )


def choose_anchors(
    tried: Sequence[tuple[AnchorSet, float]], usual: tuple[AnchorSet, float]
) -> Choice:
    """The smallest set of k-means that reaches about as many boxes as the largest.

    Args:
      tried: sets by ascending size, and the class mean of the boxes that they reach by IoU 0.5.
      usual: the three usual anchors, likewise.
    """
    best = max(recall for _, recall in tried)
    chosen, recall = next(pair for pair in tried if pair[1] >= best - 0.01)
    return Choice(
        {
            "model.anchors.scales": chosen.scales,
            "model.anchors.ratios": chosen.ratios,
            "model.anchors.ratio_convention": "h/w",
        },
        f"K-means over the boxes on this canvas: {chosen.size} anchors a place reach "
        f"{100 * recall:.1f} % of them by IoU 0.5 (mean of the classes), the usual three "
        f"{100 * usual[1]:.1f} % (scripts.select_anchors tells more).",
    )


def choose_model(facts: Facts, device: Device, pretrained: str) -> list[Choice]:
    """Trunk, heads and masks."""
    if device.platform == "cpu":
        fields: dict[str, Any] = {
            "model.backbone": "efficientnet_lite0",
            "model.dtype": "float32",
            "model.fpn_channels": 64,
            "model.fpn_norm": "none",
            "model.rpn.loss.num_samples": 128,
            "model.rpn.train_proposals": dict(pre_nms=500, post_nms=300, nms_iou=0.7),
            "model.rpn.test_proposals": dict(pre_nms=500, post_nms=300, nms_iou=0.7),
            "model.box_head.width": 256 if facts.num_classes <= 80 else 512,
            "model.box_head.sample.num_samples": 64,
        }
        why = "A CPU: the small network of configs/detection/quickstart.py and photos_lite0.py."
    else:
        fields = {"model.backbone": "resnet50", "model.dtype": "bfloat16"}
        why = "Accelerators: ResNet-50 with FPN, the baseline that all papers compare with."
    trunk = fields["model.backbone"]
    start: dict[str, Any] = {"model.norm": "group", "model.frozen_stages": 0}
    why_start = (
        "No --pretrained: random weights, which group norm bears. Weights of ImageNet learn many "
        f"times faster: python -m scripts.convert_weights --input=FILE --backbone={trunk} "
        f"--output={trunk}.safetensors, then this command with --pretrained."
    )
    if pretrained:
        start = {"model.pretrained": pretrained, "model.norm": "frozen"}
        why_start = "Starts from weights of ImageNet, whose batch norms stay as they are."
    choices = [Choice(fields, why), Choice(start, why_start)]
    if facts.has_masks:
        small = device.platform == "cpu"
        kind = "class_specific" if facts.num_classes <= 80 and not small else "class_agnostic"
        masks: dict[str, Any] = {
            "data.mask_size": 56 if small else 112,
            "model.mask_head.kind": kind,
        }
        if small:
            masks |= {"model.mask_head.width": 64, "model.mask_head.num_convs": 2}
        choices.append(
            Choice(
                masks, "The set has masks: a mask head learns them beside the boxes (Mask R-CNN)."
            )
        )
    return choices


def choose_batch(facts: Facts, device: Device, canvas: tuple[int, int]) -> Choice:
    """Images of a step."""
    area = canvas[0] * canvas[1]
    if device.platform == "cpu":
        each, why = (4 if area <= 448 * 448 else 2), "small steps, many of them: CPU time is short"
    else:
        memory = device.memory_gib or 16.0
        each = int(np.clip(2 * memory / 16 * (800 * 1344) / area, 1, 16))
        why = (
            f"2 images of 800x1344 fit 16 GiB (measured by scripts.plan_pod), here are "
            f"{memory:.0f} GiB and {canvas[0]}x{canvas[1]}"
        )
    batch = min(each * device.count, max(device.count, facts.num_photos))
    batch = max(batch // device.count, 1) * device.count
    fields = {"data.batch_size": batch, "evaluation.batch_size": max(batch, device.count)}
    devices = "one device" if device.count == 1 else f"each of {device.count} devices"
    return Choice(fields, f"{batch // device.count} images on {devices}: {why}.")


def choose_schedule(facts: Facts, device: Device, batch: int) -> Choice:
    """Length and learning rate."""
    on_cpu = device.platform == "cpu"
    wanted, low, high = (3_500, 2, 60) if on_cpu else (1_400_000, 12, 72)
    epochs = float(np.clip(round(wanted / max(facts.num_photos, 1)), low, high))
    steps = max(int(epochs * facts.num_photos / batch), 1)
    drops = (round(0.75 * epochs, 2), round(0.92 * epochs, 2))
    fields: dict[str, Any] = {
        "optimizer.num_epochs": epochs,
        "optimizer.decay_epochs": drops,
        "optimizer.warmup_steps": max(min(500, steps // 10), 1),
        "optimizer.learning_rate_per_image": 0.002,
        "optimizer.clip_norm": 5.0 if on_cpu else 35.0,
        "checkpoint.every_steps": int(np.clip(steps // 10, 1, 2000)),
        "checkpoint.keep_epochs": False,
        "log.every_steps": int(np.clip(steps // 50, 1, 50)),
    }
    return Choice(
        fields,
        f"{epochs:g} epochs of {facts.num_photos} photos are {steps} steps: small sets are seen "
        "more often, large ones less. The rate follows the batch size; it drops at three quarters "
        "and near the end.",
    )


def choose_sampler(facts: Facts) -> list[Choice]:
    """Which photos come how often, and how rare classes are taken."""
    seen = facts.photos_of_class[facts.photos_of_class > 0]
    if not len(seen):
        return []
    rarest, commonest = int(seen.min()), int(seen.max())
    numbers = (
        f"{len(seen)} of {facts.num_classes} classes have training photos, the rarest {rarest}, "
        f"the most common {commonest}"
    )
    if facts.metric == "lvis":
        return [
            Choice(
                {"data.sampler": "repeat_factor"}, f"{numbers}: photos of rare ones come again."
            ),
            Choice(
                {
                    "model.box_head.classifier.kind": "eql",
                    "model.detections.score_threshold": 0.0001,
                },
                "LVIS labels only some objects: the equalization loss of its 2019 winner spares "
                "rare classes. Its sigmoids need a low threshold.",
            ),
        ]
    if facts.num_classes > 1 and commonest > 20 * rarest:
        return [Choice({"data.sampler": "class_aware"}, f"{numbers}: each class is drawn alike.")]
    return [Choice({"data.sampler": "uniform"}, f"{numbers}: all photos come alike often.")]


def choose_data(facts: Facts) -> list[Choice]:
    """Where the photos are, how many boxes they have, and how they vary."""
    counts = facts.boxes_per_photo
    most = int(np.percentile(counts, 99.5)) if len(counts) else 1
    limit = int(np.clip(-(-most // 10) * 10, 10, 300))
    crowded = "up to" if limit < 300 else "more than"
    choices = [
        Choice(
            {"data.dir": facts.directory, "data.train_split": facts.train_split},
            f"{facts.num_photos} training photos, {facts.num_classes} classes.",
        ),
        Choice(
            {"data.max_boxes": limit, "model.detections.max_detections": max(100, 2 * limit)},
            f"Nearly all photos have {crowded} {limit} objects; twice as many may be found.",
        ),
    ]
    if facts.num_photos < 2000:
        choices.append(
            Choice(
                {"data.scale_jitter": (0.8, 1.25)},
                "Few photos: each is shown a little smaller or larger every time.",
            )
        )
    metric = facts.metric + ("_masks" if facts.has_masks else "")
    if facts.eval_split:
        evaluation: dict[str, Any] = {
            "data.eval_split": facts.eval_split,
            "evaluation.metric": metric,
        }
        why = f"Scored on the split {facts.eval_split!r} at the end, by the metric of such sets."
    else:
        evaluation = {"evaluation.every_epochs": -1, "evaluation.metric": metric}
        why = "The set has no split to score on; prepare_data --split=random makes one."
    return [*choices, Choice(evaluation, why)]


def share_of_photo(boxes: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, " M"]:
    """sqrt(width * height) of normalised boxes, as a share of the photo's."""
    return np.sqrt(np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1))
