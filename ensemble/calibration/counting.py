"""How often each table is right at which score, counted over a split in chunks of whole images.

A detection is right as far as the metric says: for openimages where it takes an object at IoU 0.5,
for coco and lvis as the share of the IoU thresholds 0.50:0.05:0.95 that its overlap with the object
reaches (what it adds to AP, expected over the thresholds). Detections that the metric does not
judge are left out. With masks the overlaps are those of the masks.

Shape legend: F folds, T tables, K classes, B bins of scores, n prepared rows, m judged ones.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics import matching
from common.metrics.lvis_matching import THRESHOLDS
from common.metrics.openimages import Matches, match_detections
from common.metrics.rules import Rule
from ensemble.calibration import curves
from ensemble.calibration.mask_overlaps import MaskOverlaps
from ensemble.chunks import Chunk, aligned_chunks
from ensemble.inputs import Tables
from ensemble.preparation import Preparation, PreparedRows

_LEAST_IOU = 0.5


class Judged(NamedTuple):
    """Judged detections of a chunk: their rows among the prepared ones, and how right they are."""

    rows: Int64[np.ndarray, " m"]
    targets: Float[np.ndarray, " m"]


class JudgedChunk(NamedTuple):
    """A chunk with its prepared rows and the judgement of each table's."""

    chunk: Chunk
    prepared: PreparedRows
    judged: Judged
    folds: Int[np.ndarray, " n"]  # of the image of each prepared row, -1 outside the split


@dataclasses.dataclass(frozen=True)
class Counts:
    """Detections by fold, class and bin of their scores, of one table.

    Attributes:
      rows: judged detections.
      hits: sum of their targets.
      scores: mean score of each bin.
    """

    rows: Float[np.ndarray, "F K B"]
    hits: Float[np.ndarray, "F K B"]
    scores: Float[np.ndarray, " B"]

    def without(self, fold: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and hits (K, B) of all folds but one; None: of all."""
        rows, hits = self.rows.sum(axis=0), self.hits.sum(axis=0)
        if fold is None:
            return rows, hits
        return rows - self.rows[fold], hits - self.hits[fold]


def folds_of(
    dataset: Dataset, split: str, tables: Tables, num_folds: int, seed: int
) -> Int[np.ndarray, " I"]:
    """Fold of each image of the tables, -1 for those outside the split.

    Raises:
      UserError: the tables lack images of the split, or it has fewer images than folds.
    """
    wanted = dataset.split(split)
    indices = dataset.find_images(tables.image_ids)
    inside = np.flatnonzero(np.isin(indices, wanted))
    missing = np.setdiff1d(wanted, indices[inside])
    if len(missing):
        raise UserError(
            f"--inputs: the tables cover {len(inside)} of the {len(wanted)} images of split "
            f"{split!r}, {dataset.image_id(missing[0])!r} is missing"
        )
    if len(inside) < num_folds:
        raise UserError(
            f"{dataset.directory}: split {split!r} has {len(inside)} images, expected "
            f"{num_folds} or more, one for each fold"
        )
    folds = np.full(len(indices), -1)
    folds[inside] = np.random.default_rng(seed).permutation(len(inside)) % num_folds
    return folds


def judged_chunks(
    tables: Tables, folds: Int[np.ndarray, " I"], *, rows: int, masks: bool
) -> Iterator[Chunk]:
    """Chunks with images of the split, to be handed to `judge_chunk`."""
    for chunk in aligned_chunks(tables, rows=rows, masks=masks):
        if (folds[chunk.first : chunk.stop] >= 0).any():
            yield chunk


def judge_chunk(
    tables: Tables,
    preparation: Preparation,
    rule: Rule,
    folds: Int[np.ndarray, " I"],
    chunk: Chunk,
    mask_overlaps: MaskOverlaps | None = None,
) -> JudgedChunk:
    """Prepares and judges the rows of a chunk; each table by itself, as if alone."""
    prepared = preparation.apply(chunk)
    places = np.flatnonzero(folds[chunk.first : chunk.stop] >= 0) + chunk.first
    indices = rule.dataset.find_images([tables.image_ids[place] for place in places])
    truth = rule.truth(indices)
    local = np.full(chunk.stop - chunk.first, -1)
    local[places - chunk.first] = np.arange(len(places))
    images = local[prepared.images - chunk.first]
    parts = []
    for model in range(len(tables.names)):
        first, stop = np.searchsorted(prepared.models, [model, model + 1])
        own = np.flatnonzero(images[first:stop] >= 0) + first
        matches = match_detections(
            truth,
            images[own],
            prepared.labels[own],
            prepared.scores[own],
            prepared.boxes[own],
            len(tables.labels),
            _LEAST_IOU,
        )
        if mask_overlaps is not None:
            matches = mask_overlaps.apply(matches, truth, chunk, prepared.source[own])
        counted = matches.kinds != matching.ABSORBED
        parts.append((own[matches.rows[counted]], targets_of(matches, rule.metric)[counted]))
    rows, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return JudgedChunk(chunk, prepared, Judged(rows, targets), folds[prepared.images])


def targets_of(matches: Matches, metric: str) -> Float[np.ndarray, " m"]:
    """How right each detection is, as the head of this module says."""
    found = matches.kinds == matching.TRUE
    if metric == "openimages":
        return found.astype(np.float64)
    # A hair's breadth below, as the metrics compare decimals of pixels.
    reached = np.searchsorted(THRESHOLDS - 1e-6, matches.overlaps, "right")
    return np.where(found, reached / len(THRESHOLDS), 0.0)


class Counter:
    """Adds up the counts of all tables."""

    def __init__(self, num_tables: int, num_classes: int, num_folds: int):
        self._shape = (num_folds, num_classes, curves.NUM_BINS)
        shape = (num_tables, int(np.prod(self._shape)))
        self._rows, self._hits = np.zeros(shape), np.zeros(shape)
        self._scores = np.zeros((num_tables, curves.NUM_BINS))

    def add(self, part: JudgedChunk) -> None:
        prepared, (rows, targets) = part.prepared, part.judged
        bins = curves.bins_of(prepared.scores[rows])
        key = (part.folds[rows] * self._shape[1] + prepared.labels[rows]) * curves.NUM_BINS + bins
        bounds = np.searchsorted(prepared.models[rows], np.arange(len(self._rows) + 1))
        for model, (first, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            own = slice(first, stop)
            np.add.at(self._rows[model], key[own], 1.0)
            np.add.at(self._hits[model], key[own], targets[own])
            self._scores[model] += np.bincount(
                bins[own], prepared.scores[rows[own]], curves.NUM_BINS
            )

    def counts(self) -> list[Counts]:
        """Counts of each table."""
        found = []
        for rows, hits, scores in zip(self._rows, self._hits, self._scores, strict=True):
            rows, hits = rows.reshape(self._shape), hits.reshape(self._shape)
            total = rows.sum(axis=(0, 1))
            found.append(Counts(rows, hits, scores / np.maximum(total, 1)))
        return found
