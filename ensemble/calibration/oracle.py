"""What a perfect ranking of a table's boxes would reach: the ceiling of every re-scoring.

Shape legend: n rows.
"""

import dataclasses
import os

import numpy as np

from common.data.dataset import Dataset
from common.metrics import official
from common.metrics.names import Metric
from common.metrics.openimages import match_detections
from common.metrics.rules import make_rule
from common.tables import read_detections
from ensemble.calibration.counting import targets_of


def best_ranking(table: str | os.PathLike, dataset: Dataset, split: str, metric: Metric) -> float:
    """Figure of a table whose scores are replaced by how right each row is.

    Args:
      table: detections of boxes.
      dataset: truth.
      split: that is scored, and small enough to be in memory.
      metric: of boxes.
    """
    found = read_detections(table, dataset.class_labels)
    rule = make_rule(dataset, metric)
    indices = dataset.find_images(found.image_ids)
    inside = np.isin(indices, dataset.split(split))
    rows = found.take(inside[found.image_index])
    codes, images = np.unique(rows.image_index, return_inverse=True)
    matches = match_detections(
        rule.truth(indices[codes]),
        images,
        rows.label_index,
        rows.scores,
        rows.boxes,
        dataset.num_classes,
        0.5,
    )
    scores = np.zeros(len(rows))
    scores[matches.rows] = targets_of(matches, rule.metric)
    scores = (0.999 * scores + 0.001 * rows.scores).astype(np.float32)
    order = np.lexsort((-scores, rows.image_index))
    ranked = dataclasses.replace(rows.take(order), scores=scores[order])
    figures = official.evaluate(metric, dataset, split, ranked, say=lambda _: None)
    return next(iter(official.headline(metric, figures).values()))
