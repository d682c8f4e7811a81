"""How a metric judges single detections, for what needs more of it than its figures.

`scripts.report` and `ensemble.search` look at each detection at one IoU threshold. Which of them
count, and what is to be found, differs between the metrics:

    openimages  classes that were verified in the image (all, where the dataset is annotated
                exhaustively); truth copied to parent classes; a group-of box that was hit counts
    coco        all classes in all images; crowds count nothing and absorb what lies inside
    lvis        as coco, of the classes that were verified in the image; where not every object
                has a box, a detection that finds none counts nothing
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import NOT_EXHAUSTIVE, Dataset
from common.io.errors import UserError
from common.metrics.names import BOX_METRICS, Metric
from common.metrics.openimages import Truth, count_truth, gather_truth
from common.tables.hierarchy import ancestors
from common.tables.ranges import rows_of


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of the metrics on one dataset.

    Attributes:
      metric: one of `BOX_METRICS`.
      dataset: holds the truth.
      parents: classes that truth is copied to; row c marks those of class c.
      group_of_weight: what a group-of box that was hit counts, and adds to what is to be found.
      image_labels: of openimages: classes verified at image level are judged.
    """

    metric: str
    dataset: Dataset
    parents: Bool[np.ndarray, "K K"]
    group_of_weight: float
    image_labels: bool

    def truth(self, images: Int[np.ndarray, " I"]) -> Truth:
        """Ground truth of images, and which classes are judged in each."""
        dataset = self.dataset
        truth = gather_truth(dataset, images, self.parents, self.image_labels)
        if self.metric == "coco":
            return truth._replace(evaluated=np.ones_like(truth.evaluated))
        return _with_forgiving(dataset, images, truth) if self.metric == "lvis" else truth

    def counts(self, images: Int[np.ndarray, " n"]) -> Float[np.ndarray, " K"]:
        """Objects to find, by class."""
        return count_truth(self.dataset, images, self.parents, self.group_of_weight)


def make_rule(
    dataset: Dataset, metric: str, *, image_labels: bool = True, group_of_weight: float = 1.0
) -> Rule:
    """The rule of a metric, or for "" that of the dataset (`metric_of`).

    Args:
      dataset: holds the truth.
      metric: one of `BOX_METRICS`, or "".
      image_labels: of openimages, see `Rule`.
      group_of_weight: of openimages; the others give crowds no weight.

    Raises:
      UserError: another metric, or lvis on a dataset without LVIS's verified classes.
    """
    metric = metric or metric_of(dataset)
    if metric not in BOX_METRICS:
        raise UserError(f"--metric={metric}: expected one of {', '.join(BOX_METRICS)}")
    if metric == "lvis" and not dataset.meta.get("frequency"):
        raise UserError(
            f"{dataset.directory}/dataset.json: no frequency of the classes, metric lvis needs a "
            "dataset made by python -m scripts.prepare_data lvis"
        )
    if metric == "openimages":
        parents = ancestors(dataset.hierarchy, dataset.class_labels)
        return Rule(metric, dataset, parents, group_of_weight, image_labels)
    none = np.zeros((dataset.num_classes, dataset.num_classes), bool)
    return Rule(metric, dataset, none, 0.0, True)


def metric_of(dataset: Dataset) -> Metric:
    """The metric that fits what a dataset says of itself."""
    if dataset.meta.get("frequency"):
        return "lvis"
    return "coco" if dataset.meta.get("exhaustive") else "openimages"


def _with_forgiving(dataset: Dataset, images: Int[np.ndarray, " I"], truth: Truth) -> Truth:
    """Adds a group-of box over the whole image for each class that is not exhaustively boxed.

    Without weight it absorbs the detections that find no object, and counts nothing itself.
    """
    owner, rows = rows_of(dataset.label_offsets, images)
    open_ended = np.asarray(dataset.label_confidences[rows]) == NOT_EXHAUSTIVE
    keys = owner[open_ended] * dataset.num_classes
    keys += np.asarray(dataset.label_classes[rows[open_ended]], np.int64)
    count = len(keys)
    everywhere = np.tile(np.array([-1.0, -1.0, 2.0, 2.0]), (count, 1))
    order = np.argsort(np.concatenate([truth.keys, keys]), kind="stable")
    return truth._replace(
        boxes=np.concatenate([truth.boxes, everywhere])[order],
        keys=np.concatenate([truth.keys, keys])[order],
        group_of=np.concatenate([truth.group_of, np.ones(count, bool)])[order],
        rows=np.concatenate([truth.rows, np.full(count, -1)])[order],
        own=np.concatenate([truth.own, np.zeros(count, bool)])[order],
    )
