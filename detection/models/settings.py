"""`config.model` of detectors and refiners, read and checked once.

Every class here mirrors a table of fields of configs/detection/base.py, where each field is
explained. Instances are hashable, so that Linen modules can hold them.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from common.io.settings import check
from common.nn.backbones import BACKBONES
from common.nn.layers.norm import NORM_KINDS
from detection.classifiers.settings import RoIClassifierSettings
from detection.models.weak_settings import WeakSettings


def _at_least(low: float, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        check(value >= low, name, value, f"at least {low}")


def _shares(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        check(0 <= value <= 1, name, value, "a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class NASFPNSettings:
    repeats: int
    min_level: int
    norm: str

    def __post_init__(self):
        check(self.norm in NORM_KINDS, "norm", self.norm, f"one of {', '.join(NORM_KINDS)}")
        _at_least(1, self, "repeats")


@dataclasses.dataclass(frozen=True)
class AnchorSettings:
    scales: tuple[float, ...]
    ratios: tuple[float, ...]
    ratio_convention: Literal["h/w", "w/h"]
    centre: float
    rounded: bool
    spacing: Literal["stride", "canvas"]

    def __post_init__(self):
        for name, values in (("scales", self.scales), ("ratios", self.ratios)):
            check(bool(values) and min(values) > 0, name, values, "positive numbers")


@dataclasses.dataclass(frozen=True)
class RPNLossSettings:
    positive_iou: float
    negative_iou: float
    best_match_iou: float
    num_samples: int
    positive_fraction: float
    beta: float

    def __post_init__(self):
        _shares(self, "positive_iou", "negative_iou", "best_match_iou", "positive_fraction")
        ordered = self.negative_iou <= self.positive_iou
        check(
            ordered, "negative_iou", self.negative_iou, f"at most positive_iou={self.positive_iou}"
        )
        _at_least(1, self, "num_samples")
        _at_least(0, self, "beta")


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
    pre_nms: int
    post_nms: int
    nms_iou: float

    def __post_init__(self):
        _at_least(1, self, "pre_nms", "post_nms")
        _shares(self, "nms_iou")


@dataclasses.dataclass(frozen=True)
class RPNSettings:
    num_convs: int
    loss: RPNLossSettings
    train_proposals: ProposalSettings
    test_proposals: ProposalSettings

    def __post_init__(self):
        _at_least(1, self, "num_convs")


@dataclasses.dataclass(frozen=True)
class OffsetSettings:
    offset_width: int
    gamma: float
    offset_init: Literal["small", "zero", "release"]


@dataclasses.dataclass(frozen=True)
class RoISampleSettings:
    num_samples: int
    positive_fraction: float

    def __post_init__(self):
        _at_least(1, self, "num_samples")
        _shares(self, "positive_fraction")


@dataclasses.dataclass(frozen=True)
class BoxLossSettings:
    beta: float
    normaliser: Literal["sampled", "positive"]
    target_gradient: bool

    def __post_init__(self):
        _at_least(0, self, "beta")


@dataclasses.dataclass(frozen=True)
class MarginSettings:
    class_margin: float
    box_margin: float
    clip: bool


@dataclasses.dataclass(frozen=True)
class HeadConvSettings:
    count: int
    width: int
    norm: str

    def __post_init__(self):
        _at_least(0, self, "count")
        _at_least(1, self, "width")
        kinds = ("none", *NORM_KINDS)
        check(self.norm in kinds, "norm", self.norm, f"one of {', '.join(kinds)}")


@dataclasses.dataclass(frozen=True)
class BoxHeadSettings:
    kind: Literal["two_fc", "decoupling", "regressor"]
    convs: HeadConvSettings
    num_fcs: int
    width: int
    class_agnostic: bool
    pool_size: int
    aligned: bool
    sampling_ratio: int
    sample_mode: Literal["centre", "edge"]
    classifier: RoIClassifierSettings
    offsets: OffsetSettings
    sample: RoISampleSettings
    loss: BoxLossSettings
    margin: MarginSettings

    def __post_init__(self):
        _at_least(1, self, "width", "pool_size", "num_fcs")
        _at_least(0, self, "sampling_ratio")
        plain = self.kind == "two_fc"
        check(plain or not self.convs.count, "convs.count", self.convs.count, "0 of other kinds")
        check(plain or self.num_fcs == 2, "num_fcs", self.num_fcs, "2 of other kinds")
        needed = self.sampling_ratio or self.kind != "decoupling"
        check(bool(needed), "sampling_ratio", 0, "at least 1: kind 'decoupling' moves bins")
        classifier = self.classifier.kind
        check(
            self.kind != "regressor" or classifier == "softmax",
            "classifier.kind",
            classifier,
            "'softmax', which is not used: kind 'regressor' has no classes",
        )
        check(
            self.class_agnostic or not self.classifier.hierarchy,
            "class_agnostic",
            self.class_agnostic,
            "True: with classifier.hierarchy the boxes of ancestors would never be trained",
        )


@dataclasses.dataclass(frozen=True)
class MaskHeadSettings:
    kind: Literal["none", "class_specific", "class_agnostic"]
    pool_size: int
    width: int
    num_convs: int
    norm: Literal["none", "frozen"]
    stages: Literal["last", "all"]

    def __post_init__(self):
        _at_least(1, self, "pool_size", "width")
        _at_least(0, self, "num_convs")


class CascadeStage(NamedTuple):
    """Constants of one stage.

    Attributes:
      iou: overlap with a ground-truth box from which a RoI is positive.
      stds: standard deviations by which its deltas are divided.
      loss_weight: of all its losses.
      score_weight: share of its class scores in the result.
    """

    iou: float
    stds: tuple[float, float, float, float]
    loss_weight: float
    score_weight: float


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Lists with one entry a stage; `each` has the stages one by one."""

    iou: tuple[float, ...]
    stds: tuple[tuple[float, float, float, float], ...]
    loss_weights: tuple[float, ...]
    score_weights: tuple[float, ...]
    average: Literal["probability", "logit"]
    box_stage: int

    def __post_init__(self):
        lengths = {
            name: len(getattr(self, name))
            for name in ("iou", "stds", "loss_weights", "score_weights")
        }
        expected = "as many entries in iou, stds, loss_weights and score_weights"
        check(len(set(lengths.values())) == 1, "iou", lengths, expected)
        inside = -len(self.iou) <= self.box_stage < len(self.iou)
        check(inside, "box_stage", self.box_stage, f"one of the {len(self.iou)} stages")

    @property
    def each(self) -> tuple[CascadeStage, ...]:
        lists = (self.iou, self.stds, self.loss_weights, self.score_weights)
        return tuple(CascadeStage(*values) for values in zip(*lists, strict=True))


@dataclasses.dataclass(frozen=True)
class LossWeights:
    rpn_class: float
    rpn_box: float
    box_class: float
    box_regression: float
    sibling_box_class: float
    sibling_box_regression: float
    margin_class: float
    margin_box: float
    mask: float
    weak: float
    weak_refinement: float
    mined: float

    def __post_init__(self):
        _at_least(0, self, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class DetectionSettings:
    score_threshold: float
    iou_threshold: float
    max_candidates: int
    max_detections: int

    def __post_init__(self):
        _shares(self, "score_threshold", "iou_threshold")
        _at_least(1, self, "max_candidates", "max_detections")


@dataclasses.dataclass(frozen=True)
class TruthJitterSettings:
    copies: int
    shift: float
    scale: float

    def __post_init__(self):
        _at_least(0, self, "copies", "shift", "scale")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    backbone: str
    pretrained: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    norm: str
    frozen_stages: int
    deform: tuple[int, int, int]
    split_after: Literal["", "c2", "c3"]
    low_weight: float
    drop_path_rate: float
    remat: bool
    dtype: Literal["bfloat16", "float32"]
    neck: Literal["fpn", "nas_fpn"]
    fpn_channels: int
    fpn_norm: Literal["none", "frozen", "batch", "sync", "group"]
    nas_fpn: NASFPNSettings
    anchors: AnchorSettings
    ignore_ioa: float
    rpn: RPNSettings
    box_head: BoxHeadSettings
    mask_head: MaskHeadSettings
    truth_jitter: TruthJitterSettings
    weak: WeakSettings
    stages: StageSettings
    loss_weights: LossWeights
    drop_background_rois: bool
    detections: DetectionSettings

    def __post_init__(self):
        check(self.backbone in BACKBONES, "backbone", self.backbone, f"one of {BACKBONES}")
        check(self.norm in NORM_KINDS, "norm", self.norm, f"one of {', '.join(NORM_KINDS)}")
        _at_least(0, self, "frozen_stages", "low_weight")
        for name, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            check(len(values) in (0, 3), name, values, "three numbers, or () for the backbone's")
        check(0 not in self.pixel_std, "pixel_std", self.pixel_std, "no zeros")
        _at_least(1, self, "fpn_channels")
        _shares(self, "ignore_ioa", "drop_path_rate")
        check(
            not (self.refines and self.split_after),
            "split_after",
            self.split_after,
            "'': box_head.kind 'regressor' has no classes to decouple",
        )
        check(
            not (self.refines and self.has_masks),
            "mask_head.kind",
            self.mask_head.kind,
            "'none': box_head.kind 'regressor' refines boxes",
        )
        check(
            not (self.refines and self.weak.is_on),
            "weak.kind",
            self.weak.kind,
            "'none': box_head.kind 'regressor' has no classes",
        )
        check(
            not (self.box_head.classifier.hierarchy and self.mask_head.kind == "class_specific"),
            "mask_head.kind",
            self.mask_head.kind,
            "'class_agnostic': with box_head.classifier.hierarchy the masks of ancestors would "
            "never be trained",
        )
        check(
            not self.drop_background_rois or self.box_head.classifier.has_background,
            "drop_background_rois",
            self.drop_background_rois,
            f"False: box_head.classifier.kind {self.box_head.classifier.kind!r} has no score of "
            "background",
        )

    @property
    def refines(self) -> bool:
        """Whether the model moves the boxes of a table instead of finding objects."""
        return self.box_head.kind == "regressor"

    @property
    def needs_ancestors(self) -> bool:
        """Whether training asks for the ancestors of the classes."""
        return self.weak.is_on or self.box_head.classifier.hierarchy

    @property
    def has_masks(self) -> bool:
        """Whether the model outlines the objects that it finds."""
        return self.mask_head.kind != "none"

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a norm averages over all images of a batch."""
        neck = self.nas_fpn.norm if self.neck == "nas_fpn" else self.fpn_norm
        return "sync" in (self.norm, neck, self.box_head.convs.norm)


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """`config.model` of configs/pretrain: a backbone trained as image classifier."""

    backbone: str
    norm: Literal["batch", "sync", "group"]
    remat: bool
    drop_path_rate: float
    dropout_rate: float
    label_smoothing: float
    dtype: Literal["bfloat16", "float32"]

    def __post_init__(self):
        check(self.backbone in BACKBONES, "backbone", self.backbone, f"one of {BACKBONES}")
