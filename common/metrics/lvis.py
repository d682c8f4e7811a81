"""LVIS box and mask AP of a detections table, computed by faster-coco-eval class by class.

As the official tool: the best 300 detections of an image over all classes; of these, those of a
class count only where the class has a box in the image or is verified absent there, and a wrong
one is forgiven where the class is not exhaustively boxed; 101-point AP at IoU 0.50:0.05:0.95; mean
over the classes with truth, and over the rare, common and frequent ones among them.

One class at a time, with the images in which it counts, keeps the pairs of image and class few (a
matrix of all pairs of LVIS v1 takes more memory than its detections) and gives the same figures,
since AP is a mean over classes. Detections that do not count are dropped while the table is read.

Shape legend: n rows of one chunk, m detections that count, K classes, T IoU thresholds, R recall
points, A area ranges.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from common.data.dataset import ABSENT, NOT_EXHAUSTIVE, Dataset
from common.io.errors import UserError
from common.io.progress import Progress
from common.masks import rle
from common.metrics.coco import (
    check_masks,
    make_evaluation,
    pixel_boxes,
    require_sizes,
    result_rows,
    truth_annotations,
)
from common.metrics.coverage import image_ranks, open_split, selected_chunks
from common.tables import Detections
from common.tables.table import rank_in_image

MAX_PER_IMAGE = 300
AREAS = ("all", "small", "medium", "large")
FREQUENCIES = ("r", "c", "f")
CLASS_AP = "PerformanceByCategory/AP/{}"


class _Counted(NamedTuple):
    """Detections that count."""

    images: Int[np.ndarray, " m"]
    classes: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    shapes: np.ndarray  # (m, 4) x, y, width, height in pixels, or (m,) run lengths
    mask_sizes: Int[np.ndarray, "m 2"] | None


def evaluate_lvis(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    masks: bool = False,
    allow_partial: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """LVIS summary of a detections table against a split.

    Args:
      dataset: made by `scripts.prepare_data lvis`.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory.
      masks: compare masks instead of boxes.
      allow_partial: scores the covered images of the split when others are missing.
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
    truth: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth_annotations(dataset, images, masks):
        # The official tool skips segments without area.
        if annotation["area"] > 0:
            truth.setdefault(annotation["category_id"], []).append(annotation)
    if not truth:
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    verified, forgiven = _verified(dataset, images, truth)
    counted = _select(dataset, source, indices, verified, masks, name)
    ranks = image_ranks(dataset, images)
    precisions, recalls, classes = [], [], sorted(truth)
    progress = Progress(len(classes), what="LVIS AP", unit="classes")
    order = np.argsort(counted.classes, kind="stable")
    bounds = np.searchsorted(counted.classes[order], np.arange(dataset.num_classes + 1))
    for number, label in enumerate(classes):
        rows = order[bounds[label] : bounds[label + 1]]
        evaluation = _evaluate_class(
            dataset, label, truth[label], counted, rows, forgiven, ranks, frequency[label]
        )
        # One class, one limit of detections.
        precisions.append(evaluation["precision"][:, :, 0, :, 0])
        recalls.append(evaluation["recall"][:, 0, :, 0])
        progress.report(number + 1)
    precision, recall = np.stack(precisions, axis=2), np.stack(recalls, axis=1)
    result = _summary(precision, recall, np.array([frequency[label] for label in classes]))
    for place, label in enumerate(classes):
        value = _mean(precision[:, :, place, 0])
        if value >= 0:
            result[CLASS_AP.format(dataset.class_labels[label])] = value
    return result


def _verified(
    dataset: Dataset, images: Int[np.ndarray, " i"], truth: dict[int, list[dict[str, Any]]]
) -> tuple[np.ndarray, set[int]]:
    """Keys image * K + class whose detections count (sorted), and those not exhaustively boxed."""
    keys = [a["image_id"] * dataset.num_classes + c for c, rows in truth.items() for a in rows]
    forgiven = []
    for image in images.tolist():
        classes, confidences = dataset.image_labels(image)
        image_keys = image * dataset.num_classes + np.asarray(classes, np.int64)
        keys += image_keys[confidences == ABSENT].tolist()
        forgiven += image_keys[confidences == NOT_EXHAUSTIVE].tolist()
    return np.unique(np.array(keys, np.int64)), set(forgiven)


def _select(
    dataset: Dataset, source, indices: np.ndarray, verified: np.ndarray, masks: bool, name: str
) -> _Counted:
    """The detections that count, in table order."""
    parts: list[_Counted] = []
    for chunk in selected_chunks(source, dataset.class_labels, indices >= 0, masks=masks):
        chunk = chunk.take(rank_in_image(chunk.image_index) < MAX_PER_IMAGE)
        owner = indices[chunk.image_index]
        keys = owner * dataset.num_classes + chunk.label_index
        place = np.minimum(np.searchsorted(verified, keys), len(verified) - 1)
        chosen = verified[place] == keys
        chunk, owner = chunk.take(chosen), owner[chosen]
        sizes = np.asarray(dataset.image_sizes[owner])
        shapes, mask_sizes = pixel_boxes(chunk.boxes, sizes), None
        area = shapes[:, 2] * shapes[:, 3]
        if masks:
            shapes, mask_sizes = check_masks(chunk, sizes, name)
            area = rle.areas(shapes.tolist())
        chosen = area > 0
        kept_sizes = None if mask_sizes is None else mask_sizes[chosen]
        rows = (owner[chosen], chunk.label_index[chosen], chunk.scores[chosen], shapes[chosen])
        parts.append(_Counted(*rows, kept_sizes))
    if not parts:
        none = np.zeros(0, np.int64)
        return _Counted(none, none, none, none, none if masks else None)
    owners, classes, scores, shapes_of, sizes_of = zip(*parts, strict=True)
    return _Counted(
        np.concatenate(owners),
        np.concatenate(classes),
        np.concatenate(scores),
        np.concatenate(shapes_of),
        np.concatenate(sizes_of) if masks else None,
    )


def _evaluate_class(
    dataset: Dataset,
    label: int,
    truth: list[dict[str, Any]],
    detections: _Counted,
    rows: Int[np.ndarray, " d"],
    forgiven: set[int],
    ranks: dict[int, int],
    frequency: str,
) -> dict[str, Any]:
    """Precision (T, R, 1, A, 1) and recall (T, 1, A, 1) of one class."""
    owners = detections.images[rows].tolist()
    images = sorted({a["image_id"] for a in truth} | set(owners), key=ranks.__getitem__)
    content = {
        "images": [
            {
                "id": ranks[image],
                "height": int(dataset.image_sizes[image, 0]),
                "width": int(dataset.image_sizes[image, 1]),
                "neg_category_ids": [label],
                "not_exhaustive_category_ids": (
                    [label] if image * dataset.num_classes + label in forgiven else []
                ),
            }
            for image in images
        ],
        "categories": [{"id": label, "name": str(label), "frequency": frequency}],
        "annotations": [{**a, "image_id": ranks[a["image_id"]]} for a in truth],
    }
    sizes = detections.mask_sizes
    results = result_rows(
        [ranks[image] for image in owners],
        detections.classes[rows],
        detections.scores[rows],
        detections.shapes[rows],
        None if sizes is None else sizes[rows],
    )
    evaluation = make_evaluation(content, results, sizes is not None, lvis_style=True)
    evaluation.params.maxDets = [MAX_PER_IMAGE]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval


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
