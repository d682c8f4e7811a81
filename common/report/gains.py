"""AP after repairs, AP by box size, precision-recall curves and operating points.

All of it comes from the same list of entries, ranked and summed by the OpenImages metric itself.

Shape legend: E entries (detections that count, and hit group-of boxes), K classes, R recalls,
S sizes.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from common.metrics import openimages
from common.report import errors

RECALLS = 101  # points of a curve: precision at recall 0, 0.01, ... 1
SIZES = ("under 5 %", "5 to 15 %", "15 to 40 %", "over 40 %")
SIZE_EDGES = (0.05, 0.15, 0.40)  # square root of the share of the image that a box covers
REPAIRS = {
    "class": (errors.CLASS,),
    "localisation": (errors.LOCALISATION,),
    "both": (errors.BOTH,),
    "duplicate": (errors.DUPLICATE,),
    "background": (errors.BACKGROUND,),
}


class ScoredEntries(NamedTuple):
    """Entries of the metric, and what the report asks about each."""

    classes: Int[np.ndarray, " E"]
    scores: Float[np.ndarray, " E"]
    kinds: Int[np.ndarray, " E"]  # of `openimages`
    status: Int[np.ndarray, " E"]  # of `errors`
    repaired: Int[np.ndarray, " E"]
    sizes: Int[np.ndarray, " E"]  # of the object that was found, else of the detection

    def take(self, rows: np.ndarray) -> "ScoredEntries":
        return ScoredEntries(*(array[rows] for array in self))


class Curves(NamedTuple):
    """Of one table; NaN where a class has nothing to find."""

    aps: Float[np.ndarray, " K"]
    precision: Float[np.ndarray, "K R"]  # interpolated: the best at this recall or a higher one
    threshold: Float[np.ndarray, " K"]  # score of the best F1, infinite when nothing is correct
    pooled_threshold: float  # score of the best F1 of all classes together


def concatenate(parts: list[ScoredEntries]) -> ScoredEntries:
    types = (np.int16, np.float32, np.int8, np.int8, np.int16, np.int8)
    columns = zip(*parts, strict=True) if parts else [()] * len(types)
    return ScoredEntries(
        *(
            np.concatenate([np.zeros(0, kind), *column])
            for kind, column in zip(types, columns, strict=True)
        )
    )


def size_of(boxes: Float[np.ndarray, "n 4"]) -> Int[np.ndarray, " n"]:
    """Index into SIZES."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return np.digitize(np.sqrt(sides[:, 0] * sides[:, 1]), SIZE_EDGES).astype(np.int8)


def chunk_entries(
    outcomes: errors.Outcomes,
    truth: openimages.Truth,
    scores: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_classes: int,
) -> ScoredEntries:
    """Entries of one chunk, in the order of the metric."""
    matches = outcomes.matches
    entries, source = openimages.entries_of(matches, truth, scores, num_classes)
    groups = len(matches.groups)
    sizes = size_of(boxes[matches.rows])
    correct = outcomes.status == errors.CORRECT
    sizes[correct] = size_of(truth.boxes[outcomes.target[correct]])
    columns = (
        (outcomes.status, np.full(groups, errors.CORRECT, np.int8)),
        (outcomes.repaired, np.full(groups, -1, np.int16)),
        (sizes, size_of(truth.boxes[matches.groups])),
    )
    return ScoredEntries(*entries, *(np.concatenate(pair)[source] for pair in columns))


def curves(entries: ScoredEntries, counts: Float[np.ndarray, " K"]) -> Curves:
    """AP, curve and best operating point of each class.

    Args:
      entries: all of a table, in the order of the metric.
      counts: boxes to find per class.
    """
    aps = np.full(len(counts), np.nan)
    precision = np.full((len(counts), RECALLS), np.nan, np.float32)
    threshold = np.full(len(counts), np.inf, np.float32)
    grid = np.arange(RECALLS) / (RECALLS - 1)
    for index, scores, kinds in openimages.ranked_classes([_plain(entries)], counts):
        hits = (kinds != openimages.FALSE).astype(np.float64)
        aps[index] = openimages.average_precision(hits, counts[index])
        threshold[index] = _best_threshold(scores, hits, counts[index])
        true_positives = np.cumsum(hits)
        ranks = np.arange(1, len(hits) + 1)
        ceiling = np.maximum.accumulate((true_positives / ranks)[::-1])[::-1]
        # First entry that reaches each recall; 1e-9 absorbs the rounding of 0.07 * 100.
        place = np.searchsorted(true_positives, grid * counts[index] - 1e-9)
        precision[index] = np.append(ceiling, 0.0)[np.minimum(place, len(hits))]
    known = counts[entries.classes] > 0
    order = np.argsort(-entries.scores[known], kind="stable")
    hits = (entries.kinds[known] != openimages.FALSE)[order].astype(np.float64)
    pooled = _best_threshold(entries.scores[known][order], hits, counts.sum())
    return Curves(aps, precision, threshold, pooled)


def _best_threshold(scores: np.ndarray, hits: np.ndarray, count: float) -> float:
    """Score whose detections, and all better ones, have the best F1; infinity without a hit."""
    last = np.flatnonzero(np.diff(scores, append=-np.inf) < 0)  # equal scores go together
    f1 = 2 * np.cumsum(hits)[last] / (last + 1 + count)
    best = int(np.argmax(f1)) if len(last) else 0
    return float(scores[last[best]]) if len(last) and f1[best] > 0 else np.inf


def size_aps(entries: ScoredEntries, counts: Float[np.ndarray, "S K"]) -> Float[np.ndarray, " S"]:
    """mAP per box size; NaN where nothing of that size is to be found.

    As in COCO, objects of other sizes are left out together with the detections that found them,
    and of the wrong detections only those of this size count.
    """
    result = np.full(len(counts), np.nan)
    for size, of_size in enumerate(counts):
        if of_size.any():
            part = [_plain(entries.take(np.flatnonzero(entries.sizes == size)))]
            result[size] = np.nanmean(openimages.average_precisions(part, of_size, 1.0))
    return result


def repair_gains(
    entries: ScoredEntries,
    counts: Float[np.ndarray, " K"],
    missed: Float[np.ndarray, " K"],
    aps: Float[np.ndarray, " K"],
) -> dict[str, float]:
    """mAP that each kind of error costs: how much more it would be with this kind repaired.

    Class and localisation errors become correct where their object was found by nothing else (the
    best-scored one for each object), and go away otherwise; the other wrong detections go away.
    Missed objects (found by nothing, and no target of a class or localisation error) go away; a
    class with nothing left to find counts 1. `false positives` removes every wrong detection,
    `false negatives` leaves just the objects that were found. Gains do not add up.

    Args:
      entries: all of a table.
      counts: boxes to find per class.
      missed: of them the missed ones.
      aps: as they are.
    """
    before = np.nanmean(aps)
    result = {}
    for name, kinds in REPAIRS.items():
        affected = np.isin(entries.status, kinds)
        revived = affected & (entries.repaired >= 0)
        fixed = entries._replace(
            classes=np.where(revived, entries.repaired, entries.classes),
            kinds=np.where(revived, openimages.TRUE, entries.kinds).astype(np.int8),
        )
        result[name] = _mean_ap(fixed.take(~affected | revived), counts, counts) - before
    result["missed"] = _mean_ap(entries, counts - missed, counts) - before
    wrong = entries.kinds == openimages.FALSE
    result["false positives"] = _mean_ap(entries.take(~wrong), counts, counts) - before
    detected = np.bincount(entries.classes[~wrong], minlength=len(counts)).astype(np.float64)
    result["false negatives"] = _mean_ap(entries, detected, counts) - before
    return {name: float(gain) for name, gain in result.items()}


def _mean_ap(entries: ScoredEntries, left: np.ndarray, counts: np.ndarray) -> float:
    aps = openimages.average_precisions([_plain(entries)], left, 1.0)
    return float(np.mean(np.where(left > 0, aps, 1.0)[counts > 0]))


def _plain(entries: ScoredEntries) -> openimages.Entries:
    return openimages.Entries(entries.classes, entries.scores, entries.kinds)
