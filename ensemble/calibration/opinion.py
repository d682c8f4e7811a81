"""The second opinion: what the other tables say of a detection changes its precision.

For each table a logistic regression on its calibrated detections. What it looks at:

    its own calibrated score (as a logit);
    of each table, the best support: the largest p * IoU of a detection of the same class that
    overlaps it (IoU > 0.35), as a logit, and that IoU; of its own table too (duplicates);
    of each table, the best contradiction: the largest p * IoU of a detection of another class at
    its place (IoU > 0.5);
    of each table, the largest p of its class anywhere in the image;
    the size of the box.

A detection that nobody supports falls, one that all support rises; what each table's word is worth
is learned. This is stacking (Wolpert 1992) with linear weights, which a few hundred photos can
carry.

Shape legend: n rows, T tables, f features of a row, p pairs of rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from common.geometry.boxes import paired_iou
from common.tables.ranges import expand_ranges, pieces
from ensemble.calibration import curves

_SUPPORT_IOU, _CONTRADICTION_IOU = 0.35, 0.5
_LOUD = 0.02  # calibrated score from which a detection of another class contradicts
_FLOOR = 1e-4  # precision that stands for nothing
_PAIRS = 1 << 22
_ROWS = 1 << 16  # whose features are in memory
_OWN = 3  # features beside those of the tables: own score, size, constant
_OF_A_TABLE = 4


@dataclasses.dataclass(frozen=True)
class Opinion:
    """Weights of the features for the detections of each table."""

    weights: Float[np.ndarray, "T f"]

    def apply(
        self,
        images: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        models: Int[np.ndarray, " n"],
        precisions: Float[np.ndarray, " n"],
        boxes: Float[np.ndarray, "n 4"],
    ) -> Float[np.ndarray, " n"]:
        """New precisions of all rows of whole images, some images at a time."""
        found = np.zeros(len(images), np.float32)
        order = np.argsort(images, kind="stable")
        starts = np.flatnonzero(np.diff(images[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        for part in pieces(ends - starts, _ROWS):
            own = order[starts[part.start] : ends[part.stop - 1]]
            rows = images[own], labels[own], models[own], precisions[own], boxes[own]
            table = features(*rows, len(self.weights))
            found[own] = predict(self.weights, table, models[own], precisions[own])
        return found

    def arranged(self, order: Sequence[int]) -> "Opinion":
        """The same where the tables stand in another order."""
        tables = self.weights[:, 1 : 1 - _OWN].reshape(len(order), len(order), _OF_A_TABLE)
        weights = self.weights[order].copy()
        weights[:, 1 : 1 - _OWN] = tables[order][:, order].reshape(len(order), -1)
        return Opinion(weights)


def predict(
    weights: Float[np.ndarray, "T f"],
    table: Float[np.ndarray, "n f"],
    models: Int[np.ndarray, " n"],
    precisions: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Precisions by the features; a little of the first precision keeps equal ones apart."""
    scores = curves.expit(np.einsum("nf,nf->n", table, weights[models]))
    return scores * (1 - 1e-4) + 1e-4 * precisions


def fit(
    table: Float[np.ndarray, "n f"],
    models: Int[np.ndarray, " n"],
    targets: Float[np.ndarray, " n"],
    num_tables: int,
    ridge: float = 1.0,
) -> Float[np.ndarray, "T f"]:
    """Weights for each table's rows; those of a table without any make its scores what they were.

    Args:
      table: features.
      models: of the rows.
      targets: how right each is, in [0, 1].
      num_tables: T.
      ridge: of the weights of features brought to unit variance.
    """
    weights = np.zeros((num_tables, table.shape[1]))
    for model in range(num_tables):
        own = models == model
        if not own.any() or not 0 < targets[own].sum() < own.sum():
            weights[model, 0] = 1.0
            continue
        x = table[own]
        mean, spread = x.mean(axis=0), x.std(axis=0)
        mean[-1], spread[-1] = 0.0, 1.0
        spread = np.where(spread > 1e-9, spread, np.inf)  # says nothing: weight 0
        penalty = np.append(np.full(x.shape[1] - 1, ridge), 0.0)
        found = curves.fit_logistic((x - mean) / spread, np.ones(len(x)), targets[own], penalty)
        weights[model] = found / spread
        weights[model, -1] -= float((weights[model, :-1] * mean[:-1]).sum())
    return weights


def features(
    images: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    models: Int[np.ndarray, " n"],
    precisions: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_tables: int,
) -> Float[np.ndarray, "n f"]:
    """What the head of this module lists; the constant is the last column."""
    n = len(images)
    found = np.zeros((n, num_tables, _OF_A_TABLE))
    precisions = np.asarray(precisions, np.float64)
    boxes = np.asarray(boxes, np.float32)
    support, contradiction, best_iou = (found[..., i].reshape(-1) for i in range(3))
    support, contradiction, best_iou = (a.copy() for a in (support, contradiction, best_iou))
    group = images.astype(np.int64) * (int(labels.max()) + 1 if n else 1) + labels
    for row, other in _pairs(group, np.arange(n)):
        iou = paired_iou(boxes[row], boxes[other])
        near = (iou > _SUPPORT_IOU) & (row != other)
        row, other, iou = row[near], other[near], iou[near]
        value, slot = precisions[other] * iou, row * num_tables + models[other]
        np.maximum.at(support, slot, value)
        first = value >= support[slot]
        best_iou[slot[first]] = iou[first]
    for row, other in _pairs(images.astype(np.int64), np.flatnonzero(precisions >= _LOUD)):
        other_class = labels[row] != labels[other]
        row, other = row[other_class], other[other_class]
        iou = paired_iou(boxes[row], boxes[other])
        near = iou > _CONTRADICTION_IOU
        row, other, iou = row[near], other[near], iou[near]
        np.maximum.at(contradiction, row * num_tables + models[other], precisions[other] * iou)
    dense = np.unique(group, return_inverse=True)[1]
    anywhere = np.zeros((int(dense.max()) + 1 if n else 0, num_tables))
    np.maximum.at(anywhere, (dense, models), precisions)
    found[..., 0] = _logit(support.reshape(n, num_tables))
    found[..., 1] = best_iou.reshape(n, num_tables)
    found[..., 2] = _logit(contradiction.reshape(n, num_tables))
    found[..., 3] = _logit(anywhere[dense])
    side = np.sqrt(
        np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    )
    own = np.stack([curves.logit(precisions), side, np.ones(n)], axis=1)
    return np.concatenate(
        [own[:, :1], found.reshape(n, num_tables * _OF_A_TABLE), own[:, 1:]], axis=1
    )


def num_features(num_tables: int) -> int:
    return num_tables * _OF_A_TABLE + _OWN


def _logit(p: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return curves.logit(np.clip(p, _FLOOR, 1 - _FLOOR))


def _pairs(
    key: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """Rows with each of `others` of the same key, itself included, some at a time."""
    others = others[np.argsort(key[others], kind="stable")]
    theirs = key[others]
    order = np.argsort(key, kind="stable")
    first = np.searchsorted(theirs, key[order])
    counts = np.searchsorted(theirs, key[order], "right") - first
    for part in pieces(counts, _PAIRS):
        owner, place = expand_ranges(first[part], counts[part])
        yield order[part][owner], others[place]


def check_weights(weights: Sequence[Sequence[float]]) -> Float[np.ndarray, "T f"]:
    """Weights of a file as an array, of as many features as tables make.

    Raises:
      ValueError: wrong numbers.
    """
    array = np.array(weights, np.float64)
    if array.ndim != 2 or array.shape[1] != num_features(len(array)):
        raise ValueError(f"weights of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("weights that are not finite")
    return array
