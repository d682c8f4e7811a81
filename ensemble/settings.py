"""Everything that configs/ensemble/*.py say, read and checked once when a command starts."""

import dataclasses
from typing import Any, Literal

from common.io.settings import check
from ensemble.relations.rules import RelationSettings
from ensemble.tree.binary_tree import Operators
from ensemble.tree.evolution import Space
from ensemble.tree.join import ELEMENTS, NMS_TYPES


@dataclasses.dataclass(frozen=True)
class WeightSettings:
    """Weights of models and classes, see `ensemble.class_weights`.

    Attributes:
      metrics: JSON files with AP per class, in the order of the inputs or as name=file pairs; empty
        for equal weights.
      normalize: what AP is divided by, the largest ("max") or the sum of the models.
      exponent: of the relative AP.
      floor: least weight.
      models: name=weight pairs.
    """

    metrics: Any
    normalize: Literal["max", "sum", "none"]
    exponent: float
    floor: float
    models: Any

    def __post_init__(self):
        check(self.exponent >= 0, "exponent", self.exponent, "0 or more")
        check(0 <= self.floor <= 1, "floor", self.floor, "a number in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RescoringSettings:
    """Factors of rare and common classes, see `ensemble.rescoring`.

    Attributes:
      groups: file or dataset directory that tells rare, common and frequent classes; empty for no
        re-scoring.
      mode: how the factors act.
      rare, common, frequent: factors (or exponents) of the three groups.
    """

    groups: str
    mode: Literal["multiplier", "exponent"]
    rare: float
    common: float
    frequent: float


@dataclasses.dataclass(frozen=True)
class TreeCounts:
    """How many trees each stage of a search scores; see `ensemble.tree.evolution.MOVES`."""

    topology: int
    operators: int
    joint: int


@dataclasses.dataclass(frozen=True)
class MetricSettings:
    """What is left open by --metric: IoU thresholds, and how openimages counts.

    Attributes:
      iou_thresholds: AP is the mean over these; empty: 0.5 for openimages, 0.5, 0.7 and 0.9, which
        come close to the ten of coco and lvis, for these.
      group_of_weight, image_labels: see `common.metrics.openimages.evaluate_openimages`.
    """

    iou_thresholds: tuple[float, ...]
    group_of_weight: float
    image_labels: bool

    def __post_init__(self):
        for value in self.iou_thresholds:
            check(0 < value <= 1, "iou_thresholds", value, "numbers above 0, at most 1")

    def thresholds(self, metric: str) -> tuple[float, ...]:
        """IoU thresholds of a metric."""
        return self.iou_thresholds or ((0.5,) if metric == "openimages" else (0.5, 0.7, 0.9))


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """What `ensemble.search` tries.

    Attributes:
      trees: how many in each stage.
      seed: of everything random.
      population: trees that live at a time.
      tournament: trees out of which the best one is changed.
      equal: operators of all nodes of the topology stage and of new nodes.
      space: values to choose from.
      iou_threshold: above it, two boxes are one object.
      sigma: of the decay in nodes of types "soft" and "adj".
      min_score: nodes of type "soft" drop rows below it.
      naive: operator of the ensemble to compare with.
      metric: what is maximised.
      folds: of the tuned split, on which the tree must reach the best model alone.
      threads: that score side by side.
      cache_gigabytes: for joined subtrees.
      save_seconds: time between two saved states.
      log_seconds: time between two lines.
    """

    trees: TreeCounts
    seed: int
    population: int
    tournament: int
    equal: Operators
    space: Space
    iou_threshold: float
    sigma: float
    min_score: float
    naive: Any
    metric: MetricSettings
    folds: int
    threads: int
    cache_gigabytes: float
    save_seconds: float
    log_seconds: float

    def __post_init__(self):
        check(sum(dataclasses.astuple(self.trees)) > 0, "trees", "all zero", "some in a stage")
        space, equal = self.space, self.equal
        for field, values, low, high in (
            ("space.weights", space.weights, 1e-3, 1.0),
            ("space.votes", (*space.votes, equal.vote), 0.0, 10.0),
            ("space.boxes", (*space.boxes, equal.box), 0.0, 1.0),
        ):
            for value in values:
                check(low <= value <= high, field, value, f"{low:g} to {high:g}")
        for field, names, known in (
            ("space.nms", (*space.nms, equal.nms), NMS_TYPES),
            ("space.elements", space.elements, ELEMENTS),
        ):
            for name in names:
                check(name in known, field, name, f"one of {', '.join(known)}")
        for name in ("population", "tournament", "folds", "threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclasses.dataclass(frozen=True)
class EnsembleSettings:
    """A whole config.

    Attributes:
      name: of the merged model.
      dataset: dataset directory, for the order of the classes and the hierarchy; may be empty.
      coverage: what is done with tables that cover different images, see `open_tables`.
      mappings: name=FILE:COLUMN THERE:COLUMN HERE[:RULE] pairs of tables of another vocabulary.
      experts: name=file pairs of models that contribute only the classes listed there.
      masks: whether masks are kept.
      mask_rule: which masks merged rows get, see `ensemble.mask_fusion`.
      mask_match: what overlaps, the boxes or (NMS alone) the masks.
      min_score: weighted scores below it are dropped before the operator.
      calibration: JSON file of `ensemble.calibrate`, by which scores become precisions; may be
        empty.
      opinion: whether the calibration's second opinion is used, if it has one; recipes say it
        themselves.
      weights: of models and classes.
      operator: name and fields of an operator, see `ensemble.operators.make_operator`.
      tree: JSON file of `ensemble.search`, which takes the place of the operator; may be empty.
      expansion: when detections are copied to their parent classes, beside the operator.
      relations: between classes.
      rescoring: of rare and common classes.
      max_detections: of an image; 0 keeps all.
      chunk_rows: rows of all tables in memory at once, about.
      search: None where the config is only for merging.
    """

    name: str
    dataset: str
    coverage: Literal["same", "union", "intersection"]
    mappings: Any
    experts: Any
    masks: bool
    mask_rule: Literal["best", "mean"]
    mask_match: Literal["boxes", "masks"]
    min_score: float
    calibration: str
    opinion: bool
    weights: WeightSettings
    operator: Any
    tree: str
    expansion: Literal["none", "before", "after"]
    relations: RelationSettings
    rescoring: RescoringSettings
    max_detections: int
    chunk_rows: int
    search: SearchSettings | None = None

    def __post_init__(self):
        for name, low in (("max_detections", 0), ("chunk_rows", 1), ("min_score", 0)):
            check(getattr(self, name) >= low, name, getattr(self, name), f"{low} or more")
        if self.mask_rule == "mean":
            check(self.masks, "masks", self.masks, "True for mask_rule='mean'")
        if self.mask_match == "masks":
            check(self.masks, "masks", self.masks, "True for mask_match='masks'")
            name = self.operator["name"]
            check(name == "nms", "operator.name", name, "'nms' for mask_match='masks'")
