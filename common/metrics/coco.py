"""COCO box and mask AP of a detections table, computed by faster-coco-eval.

Small, medium and large are told apart by the area of the segment, as official, if the dataset
holds it (made from COCO files); else by the area of the box, so that the figures by size are only
close to the official ones. Group-of boxes are COCO's crowds. Images are taken as exhaustively
annotated; verified image-level labels play no part. An object without mask among others with masks
counts as one of an empty mask, which the official tools can read and nothing matches.

Shape legend: n rows of one chunk.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from jaxtyping import Float, Int

from common.data.dataset import GROUP_OF, Dataset
from common.io.errors import UserError
from common.metrics.coverage import checked_masks, image_ranks, open_split, selected_chunks
from common.tables import Detections
from common.tables.ranges import rows_of

# In the order of the official summary.
NAMES = (
    *("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge"),
    *("AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge"),
)
CLASS_AP = "PerformanceByCategory/AP/{}"
_DECIMALS = 3  # of a pixel


def evaluate_coco(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    masks: bool = False,
    allow_partial: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """COCO summary of a detections table against a split.

    Args:
      dataset: ground truth; the image sizes must be known.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory.
      masks: compare masks instead of boxes.
      allow_partial: scores the covered images of the split when others are missing.
      say: where notes go.

    Returns:
      The twelve figures of `NAMES` (-1 where there is no such truth, as official) and CLASS_AP of
      the label for each class that has ground truth.

    Raises:
      UserError: a broken table, unknown labels, images of the split that the table does not cover,
        no image in common, no ground truth, an image of unknown size, or (for masks) a dataset
        without masks or masks of another size than the photo.
    """
    source, indices, name = open_split(dataset, split, detections, allow_partial, say)
    images = indices[indices >= 0]
    require_sizes(dataset, images, "COCO AP")
    if masks:
        require_masks(dataset, images, say)
    ranks = image_ranks(dataset, images)
    ground_truth = _ground_truth(dataset, ranks, masks)
    if not ground_truth["annotations"]:
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    rows: list[dict[str, Any]] = []
    for chunk in selected_chunks(source, dataset.class_labels, indices >= 0, masks=masks):
        owner = indices[chunk.image_index]
        sizes = np.asarray(dataset.image_sizes[owner])
        if masks:
            shapes, mask_sizes, _ = check_masks(chunk, sizes, name)
        else:
            shapes, mask_sizes = pixel_boxes(chunk.boxes, sizes), None
        image_ids = [ranks[image] for image in owner.tolist()]
        rows += result_rows(image_ids, chunk.label_index, chunk.scores, shapes, mask_sizes)
    evaluation = make_evaluation(ground_truth, rows, masks)
    # Classes without ground truth have no AP, and pairs of image and class are what costs time.
    evaluation.params.catIds = sorted({row["category_id"] for row in ground_truth["annotations"]})
    evaluation.run()
    result = dict(zip(NAMES, map(float, evaluation.stats[: len(NAMES)]), strict=True))
    # IoU threshold, recall, class, all sizes, 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for place, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, place]
        if (values > -1).any():
            label = dataset.class_labels[category]
            result[CLASS_AP.format(label)] = float(values[values > -1].mean())
    return result


def result_rows(
    image_ids: Sequence[int],
    classes: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    shapes: np.ndarray,
    mask_sizes: Int[np.ndarray, "n 2"] | None,
) -> list[dict[str, Any]]:
    """Detections as COCO results.

    `shapes` are boxes (n, 4), x, y, width and height in pixels, or with `mask_sizes` run lengths.
    """
    kind, values = "bbox", shapes.tolist()
    if mask_sizes is not None:
        pairs = zip(mask_sizes.tolist(), values, strict=True)
        kind, values = "segmentation", [{"size": size, "counts": counts} for size, counts in pairs]
    columns = (image_ids, classes.tolist(), scores.tolist(), values)
    return [
        {"image_id": image, "category_id": label, "score": score, kind: value}
        for image, label, score, value in zip(*columns, strict=True)
    ]


def make_evaluation(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], masks: bool, **options: Any
) -> COCOeval_faster:
    """The library's evaluation, not run yet, of results against a COCO file's content."""
    truth = COCO(ground_truth)
    # loadRes of some versions cannot take an empty list.
    loaded = truth.loadRes(results) if results else COCO({**ground_truth, "annotations": []})
    kind = "segm" if masks else "bbox"
    return COCOeval_faster(truth, loaded, kind, print_function=lambda *_: None, **options)


def require_sizes(dataset: Dataset, images: Int[np.ndarray, " i"], what: str) -> None:
    """Refuses images of unknown size."""
    sizes = np.asarray(dataset.image_sizes[images])
    if (unknown := ~sizes.all(axis=1)).any():
        image = images[np.argmax(unknown)]
        raise UserError(
            f"{dataset.directory}: size of image {dataset.image_id(image)!r} is unknown, {what} "
            "needs pixels: prepare the data with --images"
        )


def require_masks(
    dataset: Dataset, images: Int[np.ndarray, " i"], say: Callable[[str], None]
) -> None:
    """Refuses images without masks as COCO's tools read them; says how many boxes have none."""
    owner, rows = rows_of(dataset.box_offsets, images)
    offsets = dataset.mask_offsets
    has_mask = np.zeros(len(rows), bool)
    if offsets is not None:
        has_mask = np.asarray(offsets[rows + 1]) > np.asarray(offsets[rows])
    if not len(rows):
        return
    expected = "expected polygons or run lengths, as COCO and LVIS files have them"

    def named(place: int) -> str:
        image, row = images[owner[place]], rows[place]
        label = dataset.class_labels[int(dataset.box_classes[row])]
        number = row - int(dataset.box_offsets[image])
        return f"image {dataset.image_id(image)!r}, box {number} ({label})"

    if not has_mask.any():
        raise UserError(f"{dataset.directory}: {named(0)} has no mask, nor has another; {expected}")
    first = int(np.argmax(has_mask))
    image, row = images[owner[first]], rows[first]
    mask = dataset.image_masks(image)[row - int(dataset.box_offsets[image])]
    if isinstance(mask, dict) and "counts" not in mask:
        raise UserError(f"{dataset.directory}: {named(first)} has a PNG file as mask, {expected}")
    if not has_mask.all():
        missing = int((~has_mask).sum())
        say(
            f"note: {dataset.directory}: {missing} of {len(rows)} boxes have no mask, so that "
            f"nothing matches them; the first: {named(int(np.argmin(has_mask)))}"
        )


def check_masks(
    chunk: Detections, sizes: Int[np.ndarray, "n 2"], name: str
) -> tuple[np.ndarray, Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """As `checked_masks`; refuses also masks of another size than their photo's, `sizes`."""
    masks, mask_sizes, areas = checked_masks(chunk, name)
    other = np.any(mask_sizes != sizes, axis=1)
    if other.any():
        row = int(np.argmax(other))
        raise UserError(
            f"{name}: image {chunk.image_ids[chunk.image_index[row]]!r} has masks of "
            f"{mask_sizes[row, 0]}x{mask_sizes[row, 1]} (height x width), expected "
            f"{sizes[row, 0]}x{sizes[row, 1]} as the photo in the dataset"
        )
    return masks, mask_sizes, areas


def truth_annotations(
    dataset: Dataset, images: Int[np.ndarray, " i"], masks: bool
) -> Iterator[dict[str, Any]]:
    """Ground truth as COCO annotations; image and category ids are indices of the dataset."""
    number = 0
    for image in images.tolist():
        boxes, classes, flags = dataset.image_boxes(image)
        first, last = dataset.box_offsets[image : image + 2]
        if dataset.whole_boxes is not None:  # the official tools clip nothing
            boxes = dataset.whole_boxes[first:last]
        height, width = dataset.image_sizes[image].tolist()
        pixels = pixel_boxes(boxes, np.broadcast_to((height, width), (len(boxes), 2)))
        areas = pixels[:, 2] * pixels[:, 3]
        segments = dataset.image_masks(image) if masks else [None] * len(boxes)
        if dataset.box_areas is not None:
            areas = segment_areas(dataset.box_areas[first:last], np.array([[height, width]]))
        elif masks:
            areas = [_segment_area(_segment(s, height, width), height, width) for s in segments]
        crowds = (np.asarray(flags) & GROUP_OF) > 0
        columns = (pixels.tolist(), classes.tolist(), crowds, map(float, areas), segments)
        for box, label, crowd, area, segment in zip(*columns, strict=True):
            number += 1
            annotation = {
                "id": number,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            if masks:
                annotation["segmentation"] = _segment(segment, height, width)
            yield annotation


def segment_areas(
    shares: Float[np.ndarray, " n"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, " n"]:
    """Areas in pixels of `Dataset.box_areas`; rounding gives back the limits of size ranges."""
    return np.round(np.asarray(shares) * sizes.prod(axis=1), 6)


def truth_masks(dataset: Dataset, image: int) -> Iterator[bytes]:
    """Compressed run lengths of the boxes of an image, in its size."""
    height, width = dataset.image_sizes[image].tolist()
    for segment in dataset.image_masks(image):
        segment = _segment(segment, height, width)
        counts = segment["counts"] if isinstance(segment, dict) else None
        if not isinstance(counts, str):
            counts = coco_mask.segmToRle(segment, width, height)["counts"]
        yield counts.encode() if isinstance(counts, str) else counts


def _segment(segment: Any, height: int, width: int) -> Any:
    """Polygons or run lengths of a box; those of no pixel where it has none."""
    return {"size": [height, width], "counts": [height * width]} if segment is None else segment


def _segment_area(segment: Any, height: int, width: int) -> float:
    return float(coco_mask.area(coco_mask.segmToRle(segment, width, height)))


def _ground_truth(dataset: Dataset, ranks: dict[int, int], masks: bool) -> dict[str, Any]:
    """The ground truth as a COCO file; image ids are ranks."""
    images = np.array(list(ranks))
    sizes = dataset.image_sizes[images].tolist()
    return {
        "images": [
            {"id": ranks[image], "height": height, "width": width}
            for image, (height, width) in zip(images.tolist(), sizes, strict=True)
        ],
        "categories": [
            {"id": index, "name": label} for index, label in enumerate(dataset.class_labels)
        ],
        "annotations": [
            {**annotation, "image_id": ranks[annotation["image_id"]]}
            for annotation in truth_annotations(dataset, images, masks)
        ],
    }


def pixel_boxes(
    boxes: Float[np.ndarray, "n 4"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n 4"]:
    """Normalised corners to x, y, width, height in pixels, float64.

    Pixels are rounded to `_DECIMALS`: the float32 of the normalised boxes is off by less, and COCO
    files give whole pixels or hundredths, on which an overlap may equal a threshold.
    """
    scale = np.asarray(sizes, np.float64)[:, [1, 0, 1, 0]]
    corners = np.round(np.asarray(boxes, np.float64) * scale, _DECIMALS)
    sides = np.round(corners[:, 2:] - corners[:, :2], _DECIMALS)
    return np.concatenate([corners[:, :2], sides], axis=1)
