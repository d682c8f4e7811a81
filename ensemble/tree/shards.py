"""Truth of some images and the detections of all models there: outcomes of candidates' rows.

What does not change from candidate to candidate is done once: dropping detections that the metric
does not judge (an image and class is a group of its own for every operator, so they touch nothing
else), and the overlaps of every input detection with the truth. A candidate's row that kept its box
looks its match up; only fused boxes are compared anew. Ranking and matching are those of
`common.metrics.openimages`.

Shape legend: I images of a shard, K classes, n rows, c copies of rows, G groups (image and class)
whose rows can count, E judged groups, t IoU thresholds.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from common.metrics import matching, openimages
from common.tables.ranges import expand_ranges
from ensemble.operators.groups import rank_rows
from ensemble.preparation import Preparation
from ensemble.tree.join import NodeRows, leaf_rows

_NONE, _NO_AREA = -1, -2
# Of every group: its first copy and the number of copies; of every copy: its judged group.
_Copies = tuple[np.ndarray, np.ndarray, np.ndarray]


class Shard:
    """Truth of some images, the detections of all models there, and their overlaps with it."""

    def __init__(
        self,
        truth: openimages.Truth,
        preparation: Preparation,
        num_classes: int,
        iou_thresholds: Sequence[float],
        group_of_weight: float,
    ):
        self._iou_thresholds, self._group_of_weight = iou_thresholds, group_of_weight
        self._num_classes = num_classes
        judged, counting = truth.evaluated, truth.evaluated
        if preparation.expansion == "after" and preparation.parents is not None:
            # A merged detection is judged in its class and in the parents of that.
            parents = preparation.parents.astype(np.float32)
            counting = judged | (judged.astype(np.float32) @ parents.T > 0)
        # Groups are numbered densely, in order of image and class.
        self._number = _numbered(counting)
        judged_number = _numbered(judged)
        self._num_judged = int(judged.sum())
        self._classes = (np.flatnonzero(judged) % num_classes).astype(np.int16)
        self._copies: _Copies | None = None
        images, labels = np.nonzero(counting)
        if (expanded := preparation.expand_merged(labels)) is not None:
            rows, copies = expanded
            targets = judged_number[images[rows] * num_classes + copies]
            rows, targets = rows[targets >= 0], targets[targets >= 0]
            counts = np.bincount(rows, minlength=len(labels))
            self._copies = np.cumsum(counts) - counts, counts, targets
        numbers = judged_number[truth.keys]
        single = ~truth.group_of
        self._single = truth.boxes[single], numbers[single]
        self._group_of = truth.boxes[~single], numbers[~single]
        self._parts: list[tuple[np.ndarray, ...]] = []
        self.leaves: list[NodeRows] = []

    def add(
        self,
        models: Int[np.ndarray, " n"],
        images: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        scores: Float[np.ndarray, " n"],
        boxes: Float[np.ndarray, "n 4"],
    ) -> None:
        """Takes prepared rows; `images` count within the shard. Rows that never count are left."""
        group = self._number[images.astype(np.int64) * self._num_classes + labels]
        kept = group >= 0
        self._parts.append(tuple(array[kept] for array in (models, group, scores, boxes)))

    def close(self, num_models: int) -> None:
        """Sorts what was added and computes the overlaps with the truth."""
        models, group, scores, boxes = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        self._parts.clear()
        first, matches, copies = 0, [], []
        for model in range(num_models):
            own = np.flatnonzero(models == model)
            # Numbers of the sorted rows, so that a leaf's lookups are contiguous.
            source = np.arange(first, first + len(own), dtype=np.int32)
            rows = leaf_rows(group[own], scores[own], boxes[own], source)._replace(source=source)
            self.leaves.append(rows)
            first += len(own)
            if self._copies is None:
                matches.append(self._match(rows.group, rows.columns))
            else:
                row, _, group_of_copy = _judged_copies(self._copies, rows.group)
                matches.append(self._match(group_of_copy, rows.columns[:, row]))
                copies.append(np.bincount(row, minlength=len(own)))
        self._matches = np.concatenate(matches, axis=2)
        if copies:  # column of `_matches` with the first copy of each row
            self._first_copy = np.cumsum(np.concatenate([[0], *copies]))[:-1].astype(np.int32)

    def _copied_to_parents(self, judged_copies: _Copies, rows: NodeRows) -> NodeRows:
        """Judged copies of a candidate's rows; `source` is then the column of `_matches`."""
        row, number, group = _judged_copies(judged_copies, rows.group)
        order = rank_rows(group, rows.scores[row])
        row, number, group = row[order], number[order], group[order]
        return NodeRows(
            group=group,
            scores=rows.scores[row],
            columns=rows.columns[:, row],
            source=self._first_copy[rows.source[row]] + number,
            moved=rows.moved[row],
        )

    def _match(
        self, group: Int[np.ndarray, " n"], columns: Float[np.ndarray, "4 n"]
    ) -> Int[np.ndarray, "t 2 n"]:
        """Single box that a detection may take and group-of box that it lies in, _NONE without, at
        each IoU threshold."""
        x0, y0, x1, y1 = columns
        matches = np.full((len(self._iou_thresholds), 2, len(group)), _NO_AREA, np.int32)
        solid = np.flatnonzero((x0 < x1) & (y0 < y1))
        boxes, group = columns.T[solid].astype(np.float64), group[solid]
        for side, (truth, numbers), union in ((0, self._single, True), (1, self._group_of, False)):
            overlap, best = matching.best_overlaps(
                boxes, group, truth, numbers, self._num_judged, union=union
            )
            for row, threshold in zip(matches[:, side], self._iou_thresholds, strict=True):
                row[solid] = np.where(overlap >= threshold, best, _NONE)
        return matches

    def entries(self, rows: NodeRows) -> list[openimages.Entries]:
        """Outcomes of a candidate's rows at each IoU threshold, as the metric would have them."""
        if self._copies is not None:
            rows = self._copied_to_parents(self._copies, rows)
        matches = self._matches[:, :, rows.source]
        fused = np.flatnonzero(rows.moved)
        if len(fused):
            matches[:, :, fused] = self._match(rows.group[fused], rows.columns[:, fused])
        return [self._outcomes(rows.group, rows.scores, *match) for match in matches]

    def _outcomes(
        self,
        group: Int[np.ndarray, " n"],
        scores: Float[np.ndarray, " n"],
        single: Int[np.ndarray, " n"],
        inside: Int[np.ndarray, " n"],
    ) -> openimages.Entries:
        """Outcomes by the box that each row may take and the group-of box that it lies in."""
        counted = single != _NO_AREA
        if len(group) > matching.MAX_PER_CLASS:
            number = np.cumsum(counted)
            starts = np.flatnonzero(np.diff(group, prepend=-1))
            before = np.repeat(number[starts] - counted[starts], np.diff(starts, append=len(group)))
            counted &= number - before <= matching.MAX_PER_CLASS
        if not counted.all():
            group, scores, single, inside = (a[counted] for a in (group, scores, single, inside))

        kinds = np.full(len(group), matching.FALSE, np.int8)
        # Rows fall in score within a group: written in reverse, the best claim on a box stays.
        claims = np.flatnonzero(single >= 0)[::-1]
        taker = np.full(len(self._single[1]), -1)
        taker[single[claims]] = claims
        kinds[taker[taker >= 0]] = matching.TRUE
        absorbed = (kinds == matching.FALSE) & (inside >= 0)
        claims = np.flatnonzero(absorbed)[::-1]
        group_scores = np.zeros(len(self._group_of[1]), np.float32)
        group_scores[inside[claims]] = scores[claims]
        hit = (group_scores > 0) & (self._group_of_weight > 0)

        kept = ~absorbed
        group = np.concatenate([group[kept], self._group_of[1][hit]])
        scores = np.concatenate([scores[kept], group_scores[hit]])
        kinds = np.concatenate([kinds[kept], np.full(hit.sum(), matching.GROUP, np.int8)])
        order = np.argsort(group, kind="stable")
        return openimages.Entries(self._classes[group[order]], scores[order], kinds[order])


def _judged_copies(
    copies: _Copies, group: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Row of each judged copy, its number among the row's copies, and its judged group."""
    starts, counts, targets = copies
    row, copy = expand_ranges(starts[group], counts[group])
    return row, copy - starts[group[row]], targets[copy]


def _numbered(chosen: Bool[np.ndarray, "I K"]) -> Int32[np.ndarray, " I*K"]:
    """Number of each chosen pair of image and class in their order, -1 for the others."""
    flat = chosen.ravel()
    return np.where(flat, np.cumsum(flat) - 1, -1).astype(np.int32)
