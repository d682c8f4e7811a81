"""Everything the report says about one detections table, streamed twice over its rows.

The first pass gathers the entries of the metric; their curves give each class the score at which it
is judged from then on (its best F1). The second pass looks at the detections above these scores:
confusions, errors by class, images. Memory holds one chunk, 13 bytes per evaluated detection and
about 40 per detection above its score.

Shape legend: I images scored, K classes, S sizes, d detections above their score.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from common.io.parallel import map_ordered
from common.io.progress import Progress
from common.metrics import openimages
from common.metrics.coverage import selected_chunks
from common.metrics.rules import Rule
from common.report import errors, gains
from common.report.scope import Scope
from common.tables import Detections, DetectionsReader
from common.tables.hierarchy import expand_detections


@dataclasses.dataclass(frozen=True)
class Judged:
    """Detections above the score of their class."""

    images: Int[np.ndarray, " d"]  # of the dataset
    classes: Int[np.ndarray, " d"]
    scores: Float[np.ndarray, " d"]
    boxes: Float[np.ndarray, "d 4"]
    status: Int[np.ndarray, " d"]  # of `errors`
    targets: Int[np.ndarray, " d"]  # row of `dataset.boxes` they are about, -1 for none


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What the page shows of one table."""

    name: str
    path: Path
    metadata: dict[str, Any]
    expanded: bool
    num_rows: int
    official: Mapping[str, float]  # figures that head the page
    curves: gains.Curves
    size_aps: Float[np.ndarray, " S"]
    gains: dict[str, float]
    thresholds: Float[np.ndarray, " K"]
    judged: Judged
    found: Int[np.ndarray, " K"]  # truth boxes found above the scores
    missed: int  # truth boxes neither found nor targets of a class or localisation error
    unfound: int  # truth boxes not found
    status_counts: Int[np.ndarray, "K 8"]  # detections by class and status
    image_found: Int[np.ndarray, " I"]
    image_wrong: Int[np.ndarray, " I"]
    found_rows: Int[np.ndarray, " f"]  # sorted rows of `dataset.boxes` found as annotated


def analyse(
    scope: Scope,
    reader: DetectionsReader,
    name: str,
    *,
    expand_predictions: bool = False,
    official: Mapping[str, float] | None = None,
    min_score: float | None = None,
    num_threads: int = 2,
    say: Callable[[str], None] = print,
) -> TableReport:
    """Judges one table.

    Args:
      scope: images and truth.
      reader: the table.
      name: how the page calls it.
      expand_predictions: as in `evaluate_openimages`.
      official: figures of the metric that head the page, by short name; None: mAP@0.5.
      min_score: judge all classes above this score, instead of each above its best one.
      num_threads: chunks worked on at a time.
      say: where progress goes.

    Raises:
      UserError: a broken table or unknown labels.
    """
    dataset, num_classes = scope.dataset, scope.dataset.num_classes
    expand = expand_predictions and not reader.metadata.get("expanded") and scope.parents.any()
    counts_groups = scope.rule.group_of_weight > 0
    index_of = dataset.find_images(reader.image_ids)
    selected = np.isin(index_of, scope.images)

    def prepare(chunk: Detections):
        if expand:
            chunk = expand_detections(chunk, scope.parents, dataset.class_labels)
        codes, image_index = np.unique(chunk.image_index, return_inverse=True)
        truth = scope.rule.truth(index_of[codes])
        return chunk, index_of[codes], image_index, truth

    def score_chunk(chunk: Detections):
        chunk, _, image_index, truth = prepare(chunk)
        rows = (truth, image_index, chunk.label_index, chunk.scores, chunk.boxes, num_classes)
        outcomes = errors.classify(*rows, counts_groups=counts_groups)
        accounted = np.bincount(
            truth.keys[outcomes.found | outcomes.claimed] % num_classes, minlength=num_classes
        )
        entries = gains.chunk_entries(outcomes, truth, chunk.scores, chunk.boxes, num_classes)
        return entries, accounted

    def chunks(step: str) -> Iterator[Detections]:
        stream = selected_chunks(reader, dataset.class_labels, selected)
        progress = Progress(reader.num_rows, what=f"{name}: {step}", unit="rows", say=say)
        done = 0
        for chunk in stream:
            yield chunk
            done += len(chunk)
            progress.report(done)

    in_threads = functools.partial(map_ordered, threads=num_threads, ahead=num_threads)
    parts = list(in_threads(score_chunk, chunks("scoring")))
    entries = gains.concatenate([part for part, _ in parts])
    accounted = sum((count for _, count in parts), np.zeros(num_classes))
    curves = gains.curves(entries, scope.counts)
    mean_ap = float(np.mean(curves.aps[scope.counts > 0]))
    say(f"{name}: mAP {mean_ap:.4f}, what errors cost")
    size_aps = gains.size_aps(entries, scope.size_counts)
    repair = gains.repair_gains(entries, scope.counts, scope.counts - accounted, curves.aps)
    del entries, parts
    thresholds = _thresholds(curves, min_score)

    def judge_chunk(chunk: Detections):
        if expand:
            chunk = expand_detections(chunk, scope.parents, dataset.class_labels)
        chunk = chunk.take(chunk.scores >= thresholds[chunk.label_index])
        codes, image_index = np.unique(chunk.image_index, return_inverse=True)
        images = index_of[codes]
        return _judge(chunk, images, image_index, scope.rule.truth(images), scope.rule)

    judged = list(in_threads(judge_chunk, chunks("judging")))
    return _collect(
        judged,
        scope,
        name=name,
        path=reader.path,
        metadata=dict(reader.metadata),
        expanded=bool(reader.metadata.get("expanded")) or expand,
        num_rows=reader.num_rows,
        official={"mAP@0.5": mean_ap} if official is None else official,
        curves=curves,
        size_aps=size_aps,
        gains=repair,
        thresholds=thresholds,
    )


def _thresholds(curves: gains.Curves, min_score: float | None) -> Float[np.ndarray, " K"]:
    if min_score is not None:
        return np.full(len(curves.aps), min_score, np.float32)
    pooled = curves.pooled_threshold if np.isfinite(curves.pooled_threshold) else 0.5
    return np.where(np.isfinite(curves.threshold), curves.threshold, np.float32(pooled))


def _judge(chunk: Detections, images, image_index, truth: openimages.Truth, rule: Rule):
    """Judged detections of a chunk, the keys of the boxes found and their rows as annotated."""
    classes, boxes, num_classes = chunk.label_index, chunk.boxes, rule.dataset.num_classes
    detected = (image_index, classes, chunk.scores, boxes)
    counts_groups = rule.group_of_weight > 0
    outcomes = errors.classify(truth, *detected, num_classes, counts_groups=counts_groups)
    skipped, skipped_targets = errors.confused(truth, image_index, classes, boxes, num_classes)
    rows = np.concatenate([outcomes.matches.rows, skipped])
    targets = np.concatenate([outcomes.target, skipped_targets])
    status = np.concatenate([outcomes.status, np.full(len(skipped), errors.UNVERIFIED, np.int8)])
    truth_rows = np.append(truth.rows, -1)  # target -1 takes the last
    judged = Judged(
        images=images[image_index[rows]].astype(np.int32),
        classes=classes[rows].astype(np.int16),
        scores=chunk.scores[rows],
        boxes=boxes[rows],
        status=status,
        targets=truth_rows[targets],
    )
    found = np.flatnonzero(outcomes.found)
    found_images = images[truth.keys[found] // num_classes]
    found_rows = truth.rows[found[truth.own[found]]]
    accounted = np.count_nonzero(outcomes.found | outcomes.claimed)
    return judged, found_images, truth.keys[found] % num_classes, found_rows, accounted


def _collect(parts: list, scope: Scope, **fields) -> TableReport:
    num_classes = scope.dataset.num_classes
    empty = Judged(*(np.zeros(shape, kind) for shape, kind in (
        (0, np.int32), (0, np.int16), (0, np.float32), ((0, 4), np.float32), (0, np.int8),
        (0, np.int64),
    )))  # fmt: skip
    pieces = [empty, *(part[0] for part in parts)]
    judged = Judged(
        *(
            np.concatenate([getattr(piece, field.name) for piece in pieces])
            for field in dataclasses.fields(Judged)
        )
    )
    none = np.zeros(0, np.int64)
    found_images, found_classes, found_rows = (
        np.concatenate([none, *(part[i] for part in parts)]) for i in (1, 2, 3)
    )
    cells = judged.classes.astype(np.int64) * len(errors.STATUS_NAMES) + judged.status
    shape = (num_classes, len(errors.STATUS_NAMES))
    wrong = np.isin(judged.status, errors.ERRORS)
    count = len(scope.images)
    return TableReport(
        judged=judged,
        found=np.bincount(found_classes, minlength=num_classes),
        missed=int(scope.counts.sum()) - sum(part[4] for part in parts),
        unfound=int(scope.counts.sum()) - len(found_classes),
        status_counts=np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape),
        image_found=np.bincount(np.searchsorted(scope.images, found_images), minlength=count),
        image_wrong=np.bincount(
            np.searchsorted(scope.images, judged.images[wrong]), minlength=count
        ),
        found_rows=np.sort(found_rows),
        **fields,
    )
