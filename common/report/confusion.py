"""Pairs of classes that a detector takes for one another.

A confusion is a detection above its score with IoU >= 0.5 on an object that is not of its class,
and not on one that is (`common.report.errors`). It is `counted` when its class is verified in the
image, so that the metric counts it as wrong, else `unverified`: nobody said that the class is not
there.

Shape legend: T tables, P pairs.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from common.report import errors
from common.report.analysis import TableReport
from common.report.scope import Scope

MAX_PAIRS = 150  # taken from each table
EXAMPLES = 3  # images kept for a pair


@dataclasses.dataclass(frozen=True)
class Confusions:
    """The commonest pairs of all tables, most counted first.

    Attributes:
      predicted: class of the detections.
      actual: class of the objects as annotated.
      counted: detections that the metric counts as wrong.
      unverified: detections that it leaves out.
      examples: for each pair (table, image) of its best-scored detections, counted ones first.
    """

    predicted: Int[np.ndarray, " P"]
    actual: Int[np.ndarray, " P"]
    counted: Int[np.ndarray, "T P"]
    unverified: Int[np.ndarray, "T P"]
    examples: list[list[tuple[int, int]]]


def confusion_rows(table: TableReport) -> Int[np.ndarray, " c"]:
    """Judged detections that are confusions."""
    status = table.judged.status
    unverified = (status == errors.UNVERIFIED) & (table.judged.targets >= 0)
    return np.flatnonzero((status == errors.CLASS) | unverified)


def count_confusions(scope: Scope, tables: Sequence[TableReport]) -> Confusions:
    """Counts all pairs and keeps MAX_PAIRS of each table."""
    num_classes = scope.dataset.num_classes
    rows = [confusion_rows(table) for table in tables]
    keys, counts = [], []
    for table, chosen in zip(tables, rows, strict=True):
        targets = table.judged.targets[chosen]
        actual = np.asarray(scope.dataset.box_classes[targets], np.int64)
        keys.append(table.judged.classes[chosen] * np.int64(num_classes) + actual)
        pairs, place = np.unique(keys[-1], return_inverse=True)
        counted = table.judged.status[chosen] == errors.CLASS
        both = [np.bincount(place[part], minlength=len(pairs)) for part in (counted, ~counted)]
        counts.append((pairs, *both))
    kept = [
        pairs[np.lexsort((pairs, -unverified, -counted))[:MAX_PAIRS]]
        for pairs, counted, unverified in counts
    ]
    pairs = np.unique(np.concatenate(kept))
    counted, unverified = (
        np.stack([_look_up(pairs, of_table[0], of_table[column]) for of_table in counts])
        for column in (1, 2)
    )
    order = np.lexsort((pairs, -unverified.sum(0), -counted.sum(0)))
    pairs = pairs[order]
    return Confusions(
        predicted=pairs // num_classes,
        actual=pairs % num_classes,
        counted=counted[:, order],
        unverified=unverified[:, order],
        examples=_examples(pairs, tables, rows, keys),
    )


def _look_up(pairs: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of `pairs` in the sorted list `known`, 0 where it is not listed."""
    if not len(known):
        return np.zeros(len(pairs), np.int64)
    place = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
    return np.where(known[place] == pairs, values[place], 0)


def _examples(
    pairs: np.ndarray,
    tables: Sequence[TableReport],
    rows: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
) -> list[list[tuple[int, int]]]:
    key = np.concatenate(keys)
    table_index = np.repeat(np.arange(len(tables)), [len(part) for part in rows])
    image, score, status = (
        np.concatenate(
            [getattr(t.judged, name)[part] for t, part in zip(tables, rows, strict=True)]
        )
        for name in ("images", "scores", "status")
    )
    order = np.lexsort((image, -score, status != errors.CLASS, key))
    starts = np.searchsorted(key[order], pairs)
    result = []
    for pair, start in zip(pairs, starts, strict=True):
        best = order[start : start + EXAMPLES]
        best = best[key[best] == pair]
        result.append([(int(table_index[row]), int(image[row])) for row in best])
    return result
