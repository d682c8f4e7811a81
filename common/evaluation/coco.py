"""COCO box AP of a detections table, computed by faster-coco-eval.

The dataset directory holds boxes, not segment areas, so small, medium and large are told apart by
the area of the box (COCO's own files use the segment's): AP, AP50, AP75 and AR1 to AR100 are as
official, the figures by size are close to it. Group-of boxes are COCO's crowds. Images are taken
as exhaustively annotated; verified image-level labels play no part.

Shape legend: n rows of one chunk.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float, Int

from common.data.dataset import GROUP_OF, Dataset
from common.detections import Detections
from common.errors import UserError
from common.evaluation.coverage import open_source, selected_chunks, split_images

# In the order of the official summary.
NAMES = (
    *("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge"),
    *("AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge"),
)
CLASS_AP = "PerformanceByCategory/AP/{}"


def evaluate_coco(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    allow_partial: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """COCO summary of a detections table against a split.

    Args:
      dataset: ground truth; the image sizes must be known.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory.
      allow_partial: scores the covered images of the split when others are missing.
      say: where notes go.

    Returns:
      The twelve figures of `NAMES` (-1 where there is no such truth, as official) and CLASS_AP of
      the label for each class that has ground truth.

    Raises:
      UserError: a broken table, unknown labels, images of the split that the table does not cover,
        no image in common, no ground truth, or an image of unknown size.
    """
    source = open_source(detections)
    indices, notes = split_images(dataset, split, source, allow_partial)
    for line in notes:
        say(line)
    images = indices[indices >= 0]
    sizes = np.asarray(dataset.image_sizes[images])
    if (unknown := ~sizes.all(axis=1)).any():
        image = images[np.argmax(unknown)]
        raise UserError(
            f"{dataset.directory}: size of image {dataset.image_id(image)!r} is unknown, COCO AP "
            "needs pixels: prepare the data with --images"
        )
    truth = COCO(_truth(dataset, images))
    if not truth.dataset["annotations"]:
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth boxes")
    rows: list[dict[str, Any]] = []
    for chunk in selected_chunks(source, dataset.class_labels, indices >= 0):
        owner = indices[chunk.image_index]
        boxes = _pixel_boxes(chunk.boxes, np.asarray(dataset.image_sizes[owner]))
        columns = (owner, chunk.label_index, chunk.scores, boxes)
        rows += [
            {"image_id": image, "category_id": label, "score": score, "bbox": box}
            for image, label, score, box in zip(*(c.tolist() for c in columns), strict=True)
        ]
    # loadRes of some versions cannot take an empty list.
    found = truth.loadRes(rows) if rows else COCO({**truth.dataset, "annotations": []})
    evaluation = COCOeval_faster(truth, found, iouType="bbox", print_function=_quiet)
    # Classes without truth have no AP, and pairs of image and class are what costs time.
    evaluation.params.catIds = sorted({row["category_id"] for row in truth.dataset["annotations"]})
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


def _quiet(*_: Any) -> None:
    """Takes the library's log lines."""


def _truth(dataset: Dataset, images: Int[np.ndarray, " i"]) -> dict[str, Any]:
    """The ground truth as a COCO file; image and category ids are indices of the dataset."""
    annotations = []
    for image in images.tolist():
        boxes, classes, flags = dataset.image_boxes(image)
        size = np.asarray(dataset.image_sizes[image])
        pixels = _pixel_boxes(boxes, np.broadcast_to(size, (len(boxes), 2)))
        crowds = (np.asarray(flags) & GROUP_OF) > 0
        for box, label, crowd in zip(pixels.tolist(), classes.tolist(), crowds, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [
            {"id": image, "height": height, "width": width}
            for image, (height, width) in zip(
                images.tolist(), dataset.image_sizes[images].tolist(), strict=True
            )
        ],
        "categories": [
            {"id": index, "name": label} for index, label in enumerate(dataset.class_labels)
        ],
        "annotations": annotations,
    }


def _pixel_boxes(
    boxes: Float[np.ndarray, "n 4"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n 4"]:
    """Normalised corners to x, y, width, height in pixels, float64."""
    scale = np.asarray(sizes, np.float64)[:, [1, 0]]
    corners = np.asarray(boxes, np.float64)
    return np.concatenate(
        [corners[:, :2] * scale, (corners[:, 2:] - corners[:, :2]) * scale], axis=1
    )
