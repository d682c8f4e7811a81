"""LVIS box and mask AP of a detections table.

As the official tool: the best 300 detections of an image over all classes; of these, those of a
class count only where the class has a box in the image or is verified absent there, and a wrong
one is forgiven where the class is not exhaustively boxed; 101-point AP at IoU 0.50:0.05:0.95; mean
over the classes with truth, and over the rare, common and frequent ones among them.

The official tool visits every pair of image and class, most of which are empty. Here images are
matched while the table is read, only where detections overlap truth (`lvis_matching`), and of a
detection remain its class, its score and two bits for each threshold and range of areas.

Shape legend: n rows of one chunk, m detections that count, g truth, v and w keys image * K + class,
K classes, k those with truth, T IoU thresholds, R recall points, A ranges of areas, b bytes.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from common.data.dataset import ABSENT, NOT_EXHAUSTIVE, Dataset
from common.io.errors import UserError
from common.io.parallel import map_ordered
from common.io.progress import Progress
from common.masks import rle
from common.metrics.coco import (
    check_masks,
    pixel_boxes,
    require_masks,
    require_sizes,
    segment_areas,
    truth_masks,
)
from common.metrics.coverage import image_ranks, open_split, selected_chunks
from common.metrics.lvis_matching import AREA_RANGES, THRESHOLDS, Shapes, match, outside_ranges
from common.tables import Detections, DetectionsReader
from common.tables.ranges import expand_ranges, rows_of
from common.tables.table import rank_in_image

MAX_PER_IMAGE = 300
AREAS = ("all", "small", "medium", "large")
FREQUENCIES = ("r", "c", "f")
CLASS_AP = "PerformanceByCategory/AP/{}"
_RECALLS = np.linspace(0, 1, 101)
_SHAPE = (len(THRESHOLDS), len(AREA_RANGES))
_BITS = len(THRESHOLDS) * len(AREA_RANGES)


class _Judged(NamedTuple):
    """Detections that count, after matching."""

    classes: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    ranks: Int[np.ndarray, " m"]  # of their images, in whose order equal scores are
    right: UInt8[np.ndarray, "m b"]  # true positives: bits of (T, A)
    counted: UInt8[np.ndarray, "m b"]  # true and false positives


def evaluate_lvis(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    masks: bool = False,
    allow_partial: bool = False,
    num_threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """LVIS summary of a detections table against a split.

    Args:
      dataset: made by `scripts.prepare_data lvis`.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory.
      masks: compare masks instead of boxes.
      allow_partial: scores the covered images of the split when others are missing.
      num_threads: chunks of images worked on at a time.
      say: where notes go.

    Returns:
      AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300 and ARl@300 as the
      official tool names them (-1 where there is no such truth), and CLASS_AP of the label for
      each class that has ground truth.

    Raises:
      UserError: a dataset without LVIS's verified classes or (for masks) without masks, a broken
        table, masks of another size than the photo, images of the split that the table does not
        cover, no image in common, or no ground truth.
    """
    frequency = dataset.meta.get("frequency")
    if not isinstance(frequency, list) or len(frequency) != dataset.num_classes:
        raise UserError(
            f"{dataset.directory}/dataset.json: no frequency of the classes: LVIS AP needs a "
            "dataset made by python -m scripts.prepare_data lvis"
        )
    source, indices, name = open_split(dataset, split, detections, allow_partial, say)
    images = np.sort(indices[indices >= 0])
    require_sizes(dataset, images, "LVIS AP")
    if masks:
        require_masks(dataset, images, say)
    truth = _read_truth(dataset, images, masks)
    if not len(truth.keys):
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    verified, forgiven = _verified(dataset, images, truth.keys)
    judged = _judge(dataset, source, indices, truth, verified, forgiven, name, num_threads)
    classes = np.unique(truth.keys % dataset.num_classes)
    precision, recall = _accumulate(judged, truth, classes, dataset.num_classes)
    result = _summary(precision, recall, np.array(frequency)[classes])
    for place, label in enumerate(classes.tolist()):
        value = _mean(precision[:, :, place, 0])
        if value >= 0:
            result[CLASS_AP.format(dataset.class_labels[label])] = value
    return result


def _read_truth(dataset: Dataset, images: Int[np.ndarray, " i"], masks: bool) -> Shapes:
    """Ground truth sorted by key, else in the order of the file."""
    owner, rows = rows_of(dataset.box_offsets, images)
    keys = images[owner] * dataset.num_classes + np.asarray(dataset.box_classes)[rows]
    sizes = np.asarray(dataset.image_sizes[images])[owner].astype(np.int64)
    shapes = pixel_boxes(np.asarray(dataset.boxes)[rows], sizes)
    areas = shapes[:, 2] * shapes[:, 3]
    if masks:
        counts = [text for image in images.tolist() for text in truth_masks(dataset, image)]
        shapes = np.array([*counts, None], object)[:-1]
        areas = rle.areas(shapes).astype(np.float64)
    if dataset.box_areas is not None:
        areas = segment_areas(np.asarray(dataset.box_areas)[rows], sizes)
    order = np.argsort(keys, kind="stable")
    order = order[areas[order] > 0]  # the official tool skips segments without area
    return Shapes(keys[order], shapes[order], areas[order], None)


def _verified(
    dataset: Dataset, images: Int[np.ndarray, " i"], truth_keys: Int[np.ndarray, " g"]
) -> tuple[Int[np.ndarray, " v"], Int[np.ndarray, " w"]]:
    """Keys image * K + class whose detections count, and those not exhaustively boxed, sorted.

    Only those of classes with truth: others have no AP.
    """
    has_truth = np.zeros(dataset.num_classes, bool)
    has_truth[truth_keys % dataset.num_classes] = True
    owner, rows = rows_of(dataset.label_offsets, images)
    classes = np.asarray(dataset.label_classes)[rows].astype(np.int64)
    confidences = np.asarray(dataset.label_confidences)[rows]
    keys = images[owner] * dataset.num_classes + classes
    absent = keys[(confidences == ABSENT) & has_truth[classes]]
    return np.union1d(truth_keys, absent), np.unique(keys[confidences == NOT_EXHAUSTIVE])


def _judge(
    dataset: Dataset,
    source: Detections | DetectionsReader,
    indices: Int[np.ndarray, " i"],
    truth: Shapes,
    verified: Int[np.ndarray, " v"],
    forgiven: Int[np.ndarray, " w"],
    name: str,
    num_threads: int,
) -> _Judged:
    """The detections that count, matched image by image as the table is read."""
    masks = truth.shapes.dtype == object
    by_image = image_ranks(dataset, indices[indices >= 0])
    ranks = np.zeros(dataset.num_images, np.int64)
    ranks[list(by_image)] = list(by_image.values())

    def judge_chunk(chunk: Detections) -> tuple[_Judged, int]:
        found, scores = _select(dataset, chunk, indices, verified, masks, name)
        keys = np.unique(found.keys)
        first = np.searchsorted(truth.keys, keys)
        _, rows = expand_ranges(first, np.searchsorted(truth.keys, keys, "right") - first)
        own = Shapes(truth.keys[rows], truth.shapes[rows], truth.areas[rows], None)
        right, counted = match(found, own, np.isin(found.keys, forgiven))
        image, label = np.divmod(found.keys, dataset.num_classes)
        bits = (np.packbits(part.reshape(-1, _BITS), axis=1) for part in (right, counted))
        judged = _Judged(label.astype(np.int32), scores, ranks[image], *bits)
        return judged, int(chunk.image_index[-1]) + 1

    none, no_bits = np.zeros(0, np.int64), np.zeros((0, -(-_BITS // 8)), np.uint8)
    parts = [_Judged(none, none, none, no_bits, no_bits)]
    progress = Progress(len(indices), what="LVIS AP", unit="images")
    chunks = selected_chunks(source, dataset.class_labels, indices >= 0, masks=masks)
    for judged, seen in map_ordered(judge_chunk, chunks, threads=num_threads, ahead=num_threads):
        parts.append(judged)
        progress.report(seen)
    return _Judged(*map(np.concatenate, zip(*parts, strict=True)))


def _select(
    dataset: Dataset,
    chunk: Detections,
    indices: Int[np.ndarray, " i"],
    verified: Int[np.ndarray, " v"],
    masks: bool,
    name: str,
) -> tuple[Shapes, Float[np.ndarray, " m"]]:
    """The rows of a chunk that count, sorted by key, and their scores."""
    chunk = chunk.take(rank_in_image(chunk.image_index) < MAX_PER_IMAGE)
    keys = indices[chunk.image_index] * dataset.num_classes + chunk.label_index
    chosen = np.flatnonzero(np.isin(keys, verified))
    chosen = chosen[np.argsort(keys[chosen], kind="stable")]
    chunk, keys = chunk.take(chosen), keys[chosen]
    sizes = np.asarray(dataset.image_sizes[keys // dataset.num_classes])
    shapes, mask_sizes = pixel_boxes(chunk.boxes, sizes), None
    areas = shapes[:, 2] * shapes[:, 3]
    if masks:
        shapes, mask_sizes, areas = check_masks(chunk, sizes, name)
    some = areas > 0
    sizes_of = None if mask_sizes is None else mask_sizes[some]
    found = Shapes(keys[some], shapes[some], areas[some].astype(np.float64), sizes_of)
    return found, chunk.scores[some]


def _accumulate(
    judged: _Judged, truth: Shapes, classes: Int[np.ndarray, " k"], num_classes: int
) -> tuple[Float[np.ndarray, "T R k A"], Float[np.ndarray, "T k A"]]:
    """Precision at the recall points, and recall, of classes with truth; -1: none of that area."""
    order = np.lexsort((judged.ranks, -judged.scores, judged.classes))
    bounds = np.searchsorted(judged.classes[order], np.append(classes, num_classes))
    inside = ~outside_ranges(truth.areas)
    labels = truth.keys % num_classes
    precision = np.full((_SHAPE[0], len(_RECALLS), len(classes), _SHAPE[1]), -1.0)
    recall = np.full((_SHAPE[0], len(classes), _SHAPE[1]), -1.0)
    for place, label in enumerate(classes.tolist()):
        rows = order[bounds[place] : bounds[place + 1]]
        totals = inside[labels == label].sum(axis=0)
        right, counted = (
            np.unpackbits(bits[rows], axis=1, count=_BITS).reshape(-1, *_SHAPE).astype(bool)
            for bits in (judged.right, judged.counted)
        )
        number = counted.cumsum(axis=0)
        for area in np.flatnonzero(totals):
            for threshold in range(_SHAPE[0]):
                hits = np.flatnonzero(right[:, threshold, area])
                true = np.arange(1, len(hits) + 1)
                # As officially, with its guard against 0 / 0.
                values = true / (number[hits, threshold, area] + np.spacing(1))
                # Where recall grows: between these places precision only falls.
                values = np.maximum.accumulate(values[::-1])[::-1]
                reached = np.searchsorted(true / totals[area], _RECALLS)
                points = np.append(values, 0.0)[reached]
                precision[threshold, :, place, area] = points
                recall[threshold, place, area] = len(hits) / totals[area]
    return precision, recall


def _summary(
    precision: Float[np.ndarray, "T R K A"], recall: Float[np.ndarray, "T K A"], frequency
) -> dict[str, float]:
    """The official figures."""
    result = {"AP": _mean(precision[..., 0])}
    for name, threshold in (("AP50", 0), ("AP75", 5)):
        result[name] = _mean(precision[threshold, ..., 0])
    for place, area in enumerate(AREAS[1:], start=1):
        result[f"AP{area[0]}"] = _mean(precision[..., place])
    for letter in FREQUENCIES:
        result[f"AP{letter}"] = _mean(precision[:, :, frequency == letter, 0])
    result[f"AR@{MAX_PER_IMAGE}"] = _mean(recall[..., 0])
    for place, area in enumerate(AREAS[1:], start=1):
        result[f"AR{area[0]}@{MAX_PER_IMAGE}"] = _mean(recall[..., place])
    return result


def _mean(values: np.ndarray) -> float:
    """Mean of what is not -1, or -1."""
    known = values[values > -1]
    return float(known.mean()) if len(known) else -1.0
