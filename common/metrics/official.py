"""The official metrics by the names that commands and configs call them."""

import os
from collections.abc import Callable, Mapping

from common.data.dataset import Dataset
from common.metrics import openimages, openimages_masks
from common.metrics.coco import evaluate_coco
from common.metrics.lvis import evaluate_lvis
from common.metrics.names import Metric
from common.metrics.openimages import evaluate_openimages
from common.metrics.openimages_masks import evaluate_openimages_masks
from common.tables import Detections


def needs_masks(metric: Metric) -> bool:
    """Whether a metric compares masks, which the table then must have."""
    return metric.endswith("_masks")


def evaluate(
    metric: Metric,
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    expand_predictions: bool = False,
    image_labels: bool = True,
    allow_partial: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Figures of a detections table against a split; see the function of each metric.

    Args:
      metric: which.
      dataset: ground truth.
      split: images to score.
      detections: table, with masks for the metrics of masks.
      expand_predictions: of OpenImages, copies detections to parent classes first.
      image_labels: of OpenImages, uses verified image-level labels.
      allow_partial: scores the covered images of the split when others are missing.
      say: where notes go.
    """
    masks = needs_masks(metric)
    if metric in ("openimages", "openimages_masks"):
        score = evaluate_openimages_masks if masks else evaluate_openimages
        return score(
            dataset,
            split,
            detections,
            expand_predictions=expand_predictions,
            image_labels=image_labels,
            allow_partial=allow_partial,
            say=say,
        )
    score_coco = evaluate_coco if metric in ("coco", "coco_masks") else evaluate_lvis
    return score_coco(dataset, split, detections, masks=masks, allow_partial=allow_partial, say=say)


def headline(metric: Metric, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that a table of results shows, by short names."""
    if metric == "openimages":
        return {"mAP@0.5": figures[openimages.MEAN_AP.format(0.5)]}
    if metric == "openimages_masks":
        return {"mask mAP@0.5": figures[openimages_masks.MEAN_AP.format(0.5)]}
    prefix = "mask " if needs_masks(metric) else ""
    return {f"{prefix}{name}": figures[name] for name in ("AP", "AP50")}
