"""Greedy matching of ranked detections with the truth of their image and class.

Image and class together are a key: image * K + class. Detections of a key stay in the order of the
table, best score first; truth is sorted by key.

Shape legend: I images of a chunk, n its detections, e those that are judged, m truths, K classes.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_PER_CLASS = 10_000  # detections of one class in one image that the official tool looks at

FALSE, TRUE, GROUP, ABSORBED = 0, 1, 2, 3  # GROUP only among ranked entries, ABSORBED never


def judged_rows(
    evaluated: Bool[np.ndarray, "I K"],
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]:
    """Rows that count at all, by key, and their keys.

    Those of evaluated classes, with positive sides, the best `MAX_PER_CLASS` of each key.
    """
    keep = evaluated[image_index, classes]
    keep &= (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    keys = (image_index.astype(np.int64) * evaluated.shape[1] + classes)[keep]
    # Stable, so that rows of one image and class stay in score order.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    rows = np.flatnonzero(keep)[order]
    top = _rank_in_run(keys) < MAX_PER_CLASS
    return rows[top], keys[top]


def _rank_in_run(keys: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number of earlier elements in the run of equal keys."""
    positions = np.arange(len(keys))
    new = np.diff(keys, prepend=-1) != 0
    return positions - np.maximum.accumulate(np.where(new, positions, 0))


def claim(
    kinds: Int[np.ndarray, " e"],
    overlaps: Float[np.ndarray, " e"],
    best: Int[np.ndarray, " e"],
    threshold: float,
    kind: int,
) -> None:
    """Gives each truth to the first detection, still FALSE, whose best one it is.

    The others look no further. `kinds` of those that got one becomes `kind`.
    """
    candidates = np.flatnonzero((kinds == FALSE) & (overlaps >= threshold))
    _, first = np.unique(best[candidates], return_index=True)
    kinds[candidates[first]] = kind


def absorb(
    kinds: Int[np.ndarray, " e"],
    rest: Int[np.ndarray, " r"],
    shares: Float[np.ndarray, " r"],
    best: Int[np.ndarray, " r"],
    threshold: float,
    scores: Float[np.ndarray, " e"],
    num_groups: int,
) -> Float[np.ndarray, " g"]:
    """Makes detections that lie in a group-of truth ABSORBED.

    Args:
      kinds: of all detections.
      rest: those that are still FALSE.
      shares: of each of them inside its best group.
      best: that group.
      threshold: on the shares.
      scores: of all detections.
      num_groups: g.

    Returns:
      The best score that each group took in, 0 for none.
    """
    inside = shares >= threshold
    group_scores = np.zeros(num_groups, np.float32)
    np.maximum.at(group_scores, best[inside], scores[rest[inside]])
    kinds[rest[inside]] = ABSORBED
    return group_scores


def best_of_key(
    keys: Int[np.ndarray, " n"],
    truth_keys: Int[np.ndarray, " m"],
    num_keys: int,
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Largest overlap of each detection with the truth of its key, and the first such truth.

    Round j compares every detection with the j-th truth of its key, if there is one: work is one
    comparison per pair, memory one row per detection.

    Args:
      keys: image and class of the detections.
      truth_keys: sorted.
      num_keys: all keys are smaller.
      measure: overlaps of detections i with truths j, given as arrays of equal length.

    Returns:
      overlap: -1 where the key has no truth.
      best: place in `truth_keys`.
    """
    counts = np.bincount(truth_keys, minlength=num_keys)
    starts = np.cumsum(counts) - counts
    overlap = np.full(len(keys), -1.0)
    best = np.zeros(len(keys), np.int64)
    remaining = counts[keys]
    active = np.flatnonzero(remaining)
    row = starts[keys]
    number = 0
    while len(active):
        pair = row[active] + number
        ratio = measure(active, pair)
        better = ratio > overlap[active]
        overlap[active[better]] = ratio[better]
        best[active[better]] = pair[better]
        number += 1
        active = active[remaining[active] > number]
    return overlap, best


def best_overlaps(
    boxes: Float[np.ndarray, "n 4"],
    keys: Int[np.ndarray, " n"],
    truth_boxes: Float[np.ndarray, "m 4"],
    truth_keys: Int[np.ndarray, " m"],
    num_keys: int,
    *,
    union: bool,
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Largest overlap of each detection's box with the boxes of its key, and the first such box.

    Args:
      boxes: detections with positive sides.
      keys: their image and class.
      truth_boxes: sorted by key.
      truth_keys: sorted.
      num_keys: all keys are smaller.
      union: divide the intersection by the union, else by the area of the detection.

    Returns:
      overlap: -1 where the key has no truth.
      best: row of `truth_boxes`.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    sides = truth_boxes[:, 2:] - truth_boxes[:, :2]
    truth_areas = sides[:, 0] * sides[:, 1]
    columns, truth_columns = np.ascontiguousarray(boxes.T), np.ascontiguousarray(truth_boxes.T)

    def measure(active: np.ndarray, pair: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = (column[active] for column in columns)
        tx0, ty0, tx1, ty1 = (column[pair] for column in truth_columns)
        width = np.minimum(x1, tx1) - np.maximum(x0, tx0)
        height = np.minimum(y1, ty1) - np.maximum(y0, ty0)
        inter = np.maximum(width, 0) * np.maximum(height, 0)
        if union:
            return inter / (areas[active] + truth_areas[pair] - inter)
        return inter / areas[active]

    return best_of_key(keys, truth_keys, num_keys, measure)
