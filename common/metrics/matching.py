"""Greedy matching of ranked detections with the ground truth of their image and class.

The matching is done for each image and class alone, which together are one number, the key:
image * K + class. Detections of a key are in the order of the table, best score first. Ground truth
is sorted by key.

Shape legend: I images of a chunk, n its detections, e those that are evaluated, m ground-truth
objects, g group-of objects, K classes.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_PER_CLASS = 10_000  # detections of one class in one image that the official tool looks at

# What a detection is: a false positive, a true positive, or inside a group-of object and therefore
# left out of the ranking, into which each group-of object that was hit goes as a GROUP instead.
FALSE, TRUE, GROUP, ABSORBED = 0, 1, 2, 3


def judged_rows(
    evaluated: Bool[np.ndarray, "I K"],
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]:
    """The detections that are evaluated, sorted by key, as rows and keys.

    They are of classes that are evaluated in their image, have positive sides and are among the
    best `MAX_PER_CLASS` of their key.
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
    matched_idx: Int[np.ndarray, " e"],
    threshold: float,
    kind: int,
) -> None:
    """Each object goes to the first detection, still FALSE, that overlaps it most of all objects.

    Sets `kinds` of these detections to `kind`. Other detections of the same object stay FALSE: no
    second-best object is tried.
    """
    candidates = np.flatnonzero((kinds == FALSE) & (overlaps >= threshold))
    _, first = np.unique(matched_idx[candidates], return_index=True)
    kinds[candidates[first]] = kind


def absorb(
    kinds: Int[np.ndarray, " e"],
    rest: Int[np.ndarray, " r"],
    shares: Float[np.ndarray, " r"],
    matched_idx: Int[np.ndarray, " r"],
    threshold: float,
    scores: Float[np.ndarray, " e"],
    num_groups: int,
) -> Float[np.ndarray, " g"]:
    """Sets the kind of detections that lie in a group-of object to ABSORBED.

    Args:
      kinds: of all detections.
      rest: the detections that are still FALSE.
      shares: largest share of each of `rest` that lies inside one group-of object.
      matched_idx: that object.
      threshold: on the shares.
      scores: of all detections.
      num_groups: g.

    Returns:
      The best score of the detections that each group-of object absorbed, 0 for none.
    """
    inside = shares >= threshold
    group_scores = np.zeros(num_groups, np.float32)
    np.maximum.at(group_scores, matched_idx[inside], scores[rest[inside]])
    kinds[rest[inside]] = ABSORBED
    return group_scores


def best_of_key(
    keys: Int[np.ndarray, " n"],
    gt_keys: Int[np.ndarray, " m"],
    num_keys: int,
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Largest overlap of each detection with the objects of its key, and the first such object.

    Round j compares every detection with the j-th object of its key, if there is one: the work is
    one comparison a pair, the memory one row a detection.

    Args:
      keys: of the detections.
      gt_keys: of the objects, sorted.
      num_keys: all keys are smaller.
      measure: overlaps of the detections i with the objects j, two arrays of equal length.

    Returns:
      overlap: -1 where the key has no object.
      matched_idx: place in `gt_keys`.
    """
    counts = np.bincount(gt_keys, minlength=num_keys)
    starts = np.cumsum(counts) - counts
    overlap = np.full(len(keys), -1.0)
    matched_idx = np.zeros(len(keys), np.int64)
    remaining = counts[keys]
    active = np.flatnonzero(remaining)
    row = starts[keys]
    number = 0
    while len(active):
        pair = row[active] + number
        ratio = measure(active, pair)
        better = ratio > overlap[active]
        overlap[active[better]] = ratio[better]
        matched_idx[active[better]] = pair[better]
        number += 1
        active = active[remaining[active] > number]
    return overlap, matched_idx


def best_overlaps(
    boxes: Float[np.ndarray, "n 4"],
    keys: Int[np.ndarray, " n"],
    gt_boxes: Float[np.ndarray, "m 4"],
    gt_keys: Int[np.ndarray, " m"],
    num_keys: int,
    *,
    union: bool,
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Largest overlap of each detection with the boxes of its key, as `best_of_key`.

    `union` divides the intersection by the union, else by the area of the detection. The boxes of
    the detections have positive sides.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    sides = gt_boxes[:, 2:] - gt_boxes[:, :2]
    gt_areas = sides[:, 0] * sides[:, 1]
    columns, gt_columns = np.ascontiguousarray(boxes.T), np.ascontiguousarray(gt_boxes.T)

    def measure(active: np.ndarray, pair: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = (column[active] for column in columns)
        tx0, ty0, tx1, ty1 = (column[pair] for column in gt_columns)
        width = np.minimum(x1, tx1) - np.maximum(x0, tx0)
        height = np.minimum(y1, ty1) - np.maximum(y0, ty0)
        inter = np.maximum(width, 0) * np.maximum(height, 0)
        if union:
            return inter / (areas[active] + gt_areas[pair] - inter)
        return inter / areas[active]

    return best_of_key(keys, gt_keys, num_keys, measure)
