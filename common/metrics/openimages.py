"""The OpenImages Challenge 2019 detection metric, vectorised and streamed.

Follows the official evaluator step by step: ground truth and image-level labels
expanded through the hierarchy, detections of classes without a verified label in the image
discarded, each detection compared with its best-overlapping box only, group-of boxes absorbing
what lies in them and counting once, all-point interpolated AP, mean over the classes with truth.

Equal scores are ranked by image id, within an image by the row order of the table (group-of
entries after the detections). The official tool leaves their order to an unstable sort; on real
scores the difference is below 1e-4.

Overlaps are computed in float64 from the float32 coordinates. Memory holds one chunk of rows plus
7 bytes per evaluated detection.

Shape legend: I images of a chunk, n its detections, m its ground-truth boxes, K classes, E entries
(detections that count, and hit group-of boxes) of all chunks, e evaluated detections of a chunk.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import GROUP_OF, Dataset
from common.io.errors import UserError
from common.io.parallel import map_ordered
from common.metrics.coverage import open_split, selected_chunks
from common.metrics.matching import (
    ABSORBED,
    FALSE,
    GROUP,
    TRUE,
    absorb,
    best_overlaps,
    claim,
    judged_rows,
)
from common.tables import Detections
from common.tables.hierarchy import ancestors, expand_detections, repeat_with
from common.tables.ranges import rows_of

MEAN_AP = "OpenImagesDetectionChallenge_Precision/mAP@{:g}IOU"
CLASS_AP = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@{:g}IOU/{}"


class Entries(NamedTuple):
    """Ranked outcomes of a chunk: a class, a score and what it counts as."""

    classes: Int[np.ndarray, " E"]
    scores: Float[np.ndarray, " E"]
    kinds: Int[np.ndarray, " E"]  # FALSE, TRUE or GROUP


class Truth(NamedTuple):
    """Ground truth of a chunk of images, with copies for ancestors, sorted by image * K + class."""

    evaluated: Bool[np.ndarray, "I K"]  # classes with a box or a verified label in the image
    boxes: Float[np.ndarray, "m 4"]
    keys: Int[np.ndarray, " m"]
    group_of: Bool[np.ndarray, " m"]
    rows: Int[np.ndarray, " m"]  # of `dataset.boxes`
    own: Bool[np.ndarray, " m"]  # the class as annotated, not a copy for an ancestor


class Matches(NamedTuple):
    """What the evaluated detections of a chunk are, sorted by key (`common.metrics.matching`)."""

    rows: Int[np.ndarray, " e"]  # of the chunk
    keys: Int[np.ndarray, " e"]
    kinds: Int[np.ndarray, " e"]  # FALSE, TRUE or ABSORBED (inside a group-of box)
    overlaps: Float[np.ndarray, " e"]  # largest IoU with one object (no group-of) of the key or -1
    matched_idx: Int[np.ndarray, " e"]  # row of `Truth` with that IoU, -1 for none
    groups: Int[np.ndarray, " g"]  # rows of `Truth`: group-of boxes that were hit
    group_scores: Float[np.ndarray, " g"]


def evaluate_openimages(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    expand_truth: bool = True,
    expand_predictions: bool = False,
    image_labels: bool = True,
    allow_partial: bool = False,
    num_threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Official metric of a detections table against a split.

    Args:
      dataset: holds the (unexpanded) ground truth, verified labels and the hierarchy.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory.
      iou_threshold: for true positives, reached or exceeded, and for the share of a detection
        inside a group-of box.
      group_of_weight: what a hit group-of box counts as, and what each adds to the number of
        boxes to find; 1 in the challenge.
      expand_truth: copies ground truth to ancestors and labels along the hierarchy, as official.
        False scores classes as annotated.
      expand_predictions: copies detections to ancestors first, unless the table says that it is
        `expanded`. The official tool does not.
      image_labels: False takes only classes with boxes in the image for evaluated (the easier
        protocol that the mmdetection and TSD releases come close to).
      allow_partial: scores the covered images of the split when others are missing.
      num_threads: chunks worked on at a time.
      say: where notes go.

    Returns:
      {MEAN_AP: mean, CLASS_AP of label: AP of each class that has ground truth}; names as the
      official tool prints them, with the label for the class.

    Raises:
      UserError: a broken table, unknown labels, images of the split that the table does not cover,
        no image in common, or no ground truth.
    """
    source, indices, _ = open_split(dataset, split, detections, allow_partial, say)
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    relatives = parents if expand_truth else np.zeros_like(parents)
    counts = count_truth(dataset, indices[indices >= 0], relatives, group_of_weight)
    if not counts.any():
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    expand = expand_predictions and not source.metadata.get("expanded")

    def score_chunk(chunk: Detections) -> Entries:
        if expand:
            chunk = expand_detections(chunk, parents, dataset.class_labels)
        codes, image_index = np.unique(chunk.image_index, return_inverse=True)
        truth = gather_truth(dataset, indices[codes], relatives, image_labels)
        rows = (image_index, chunk.label_index, chunk.scores, chunk.boxes)
        matches = match_detections(truth, *rows, dataset.num_classes, iou_threshold)
        return entries_of(matches, truth, chunk.scores, dataset.num_classes, group_of_weight)[0]

    chunks = selected_chunks(source, dataset.class_labels, indices >= 0)
    parts = list(map_ordered(score_chunk, chunks, threads=num_threads, ahead=num_threads))
    aps = average_precisions(parts, counts, group_of_weight)
    return named_figures(dataset, aps, MEAN_AP.format(iou_threshold), CLASS_AP, iou_threshold)


def named_figures(
    dataset: Dataset, aps: Float[np.ndarray, " K"], mean: str, class_ap: str, iou_threshold: float
) -> dict[str, float]:
    """Mean AP and the AP of each class that is not NaN, by the official tool's names."""
    present = np.flatnonzero(~np.isnan(aps))
    result = {mean: float(np.mean(aps[present]))}
    for index in present.tolist():
        result[class_ap.format(iou_threshold, dataset.class_labels[index])] = float(aps[index])
    return result


def gather_truth(
    dataset: Dataset,
    indices: Int[np.ndarray, " I"],
    parents: Bool[np.ndarray, "K K"],
    image_labels: bool,
) -> Truth:
    """Expanded ground truth of the given images.

    With `image_labels`, a dataset that is annotated exhaustively has every class verified.
    """
    owner, rows = rows_of(dataset.box_offsets, indices)
    copies, classes = repeat_with(np.asarray(dataset.box_classes[rows]), parents)
    owner, rows = owner[copies], rows[copies]
    evaluated = np.zeros((len(indices), len(parents)), bool)
    evaluated[owner, classes] = True
    if image_labels and dataset.meta.get("exhaustive"):
        evaluated[:] = True
    elif image_labels:
        label_owner, label_rows = rows_of(dataset.label_offsets, indices)
        labels = np.asarray(dataset.label_classes[label_rows])
        present = np.asarray(dataset.label_confidences[label_rows]) > 0
        for side, relatives in ((present, parents), (~present, parents.T)):
            copies, expanded = repeat_with(labels[side], relatives)
            evaluated[label_owner[side][copies], expanded] = True
    keys = owner * len(parents) + classes
    order = np.argsort(keys, kind="stable")
    rows = rows[order]
    return Truth(
        evaluated=evaluated,
        boxes=np.asarray(dataset.boxes[rows], np.float64),
        keys=keys[order],
        group_of=(np.asarray(dataset.box_flags[rows]) & GROUP_OF) > 0,
        rows=rows,
        own=classes[order] == dataset.box_classes[rows],
    )


def count_truth(
    dataset: Dataset,
    indices: Int[np.ndarray, " n"],
    parents: Bool[np.ndarray, "K K"],
    group_of_weight: float,
    counted: Bool[np.ndarray, " M"] | None = None,
) -> Float[np.ndarray, " K"]:
    """Number of boxes to find per class after expansion; group-of boxes count by their weight.

    Args:
      dataset: holds the truth.
      indices: images.
      parents: ancestors of each class.
      group_of_weight: of a group-of box.
      counted: which of `dataset.boxes` count; None: all.
    """
    counts = np.zeros(len(parents))
    for start in range(0, len(indices), 1 << 16):
        _, rows = rows_of(dataset.box_offsets, indices[start : start + (1 << 16)])
        group_of = (np.asarray(dataset.box_flags[rows]) & GROUP_OF) > 0
        weights = np.where(group_of, group_of_weight, 1.0)
        if counted is not None:
            weights *= counted[rows]
        counts += np.bincount(dataset.box_classes[rows], weights, len(parents))
    return counts + counts @ parents


def match_detections(
    truth: Truth,
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_classes: int,
    iou_threshold: float,
) -> Matches:
    """Matches the detections of whole images, sorted by image, then by falling score."""
    rows, keys = judged_rows(truth.evaluated, image_index, classes, boxes)
    scores, boxes = scores[rows], boxes[rows].astype(np.float64)

    num_keys = len(truth.evaluated) * num_classes
    single, group = np.flatnonzero(~truth.group_of), np.flatnonzero(truth.group_of)
    overlaps, best = best_overlaps(
        boxes, keys, truth.boxes[single], truth.keys[single], num_keys, union=True
    )
    kinds = np.full(len(rows), FALSE, np.int8)
    claim(kinds, overlaps, best, iou_threshold, TRUE)

    rest = np.flatnonzero(kinds == FALSE)
    shares, best_group = best_overlaps(
        boxes[rest], keys[rest], truth.boxes[group], truth.keys[group], num_keys, union=False
    )
    group_scores = absorb(kinds, rest, shares, best_group, iou_threshold, scores, len(group))
    hit = group_scores > 0
    matched_idx = np.full(len(rows), -1, np.int64)
    matched_idx[overlaps >= 0] = single[best[overlaps >= 0]]
    return Matches(rows, keys, kinds, overlaps, matched_idx, group[hit], group_scores[hit])


def entries_of(
    matches: Matches,
    truth: Truth,
    scores: Float[np.ndarray, " n"],
    num_classes: int,
    group_of_weight: float = 1.0,
) -> tuple[Entries, Int[np.ndarray, " E"]]:
    """Entries of a chunk, sorted by key, a key's group-of boxes after its detections.

    Args:
      matches: of the detections with `truth`.
      truth: of the chunk.
      scores: of all rows of the chunk.
      num_classes: K.
      group_of_weight: 0 leaves the group-of boxes out.

    Returns:
      The entries, and where each comes from: i < e is detection i of `matches`, e + j is group j.
    """
    if not group_of_weight:
        matches = matches._replace(groups=matches.groups[:0], group_scores=matches.group_scores[:0])
    kept = np.flatnonzero(matches.kinds != ABSORBED)
    keys = np.concatenate([matches.keys[kept], truth.keys[matches.groups]])
    ranked = np.concatenate([scores[matches.rows[kept]], matches.group_scores])
    kinds = np.concatenate([matches.kinds[kept], np.full(len(matches.groups), GROUP, np.int8)])
    source = np.concatenate([kept, len(matches.rows) + np.arange(len(matches.groups))])
    order = np.argsort(keys, kind="stable")
    classes = (keys[order] % num_classes).astype(np.int16)
    return Entries(classes, ranked[order].astype(np.float32), kinds[order]), source[order]


def average_precisions(
    parts: list[Entries], counts: Float[np.ndarray, " K"], group_of_weight: float
) -> Float[np.ndarray, " K"]:
    """All-point interpolated AP per class, NaN for classes with nothing to find."""
    credit = np.array([0.0, 1.0, group_of_weight])
    aps = np.full(len(counts), np.nan)
    for index, _, kinds in ranked_classes(parts, counts):
        aps[index] = average_precision(credit[kinds], counts[index])
    return aps


def ranked_classes(
    parts: list[Entries], counts: Float[np.ndarray, " K"]
) -> Iterator[tuple[int, Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Yields each class with something to find, and its scores and kinds, best score first."""
    classes = np.concatenate([np.zeros(0, np.int16), *(part.classes for part in parts)])
    order = np.argsort(classes, kind="stable")
    scores = np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)])[order]
    kinds = np.concatenate([np.zeros(0, np.int8), *(part.kinds for part in parts)])[order]
    ends = np.cumsum(np.bincount(classes, minlength=len(counts)))
    for index in np.flatnonzero(counts > 0):
        rows = slice(ends[index - 1] if index else 0, ends[index])
        ranked = np.argsort(-scores[rows], kind="stable")
        yield int(index), scores[rows][ranked], kinds[rows][ranked]


def average_precision(labels: Float[np.ndarray, " n"], count: float) -> float:
    """VOC 2010 AP of one class.

    Args:
      labels: weight of each entry, best score first; 0 is a false positive.
      count: what the weights of a perfect result sum to.
    """
    positives = np.flatnonzero(labels > 0)
    if not len(positives):
        return 0.0
    true = np.cumsum(labels[positives])
    false = positives - np.arange(len(positives))  # false positives ranked before each positive
    precision = true / (true + false)
    ceiling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(labels[positives] * ceiling) / count)
