"""Detected boxes that match an instance: what the segmenter will be given once it is trained.

Shape legend: n instances, p matching boxes of all of them, d rows of a table.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.tables import DetectionsReader
from common.tables.ranges import expand_ranges, pieces
from segmentation.crops.instances import Instances

MIN_IOU = 0.5
_ROWS = 1 << 18  # of the table at once
_PAIRS = 1 << 22  # of a box and an instance at once


@dataclasses.dataclass(frozen=True)
class Matches:
    """Boxes by instance.

    Attributes:
      offsets: boxes[offsets[i]:offsets[i + 1]] match instance i.
      boxes: normalised, in table order.
    """

    offsets: Int64[np.ndarray, " n+1"]
    boxes: Float32[np.ndarray, "p 4"]

    def pick(
        self, members: Int64[np.ndarray, " m"], draws: Float[np.ndarray, " m"]
    ) -> tuple[Float32[np.ndarray, "m 4"], Bool[np.ndarray, " m"]]:
        """A box of each of these instances, all equally likely, and which instances have any."""
        first, stop = self.offsets[members], self.offsets[members + 1]
        there = stop > first
        place = first + np.floor(draws * (stop - first)).astype(np.int64)
        boxes = np.zeros((len(members), 4), np.float32)
        boxes[there] = self.boxes[place[there]]
        return boxes, there


def match_proposals(path: str | os.PathLike, dataset: Dataset, instances: Instances) -> Matches:
    """Reads a detections table and keeps the boxes that match an instance of their label.

    A box belongs to the instance that it overlaps most, if their IoU in the photo is at least 0.5.

    Raises:
      UserError: a broken table, an unknown photo or label, or no box matches.
    """
    reader = DetectionsReader(path)
    images = dataset.find_images(reader.image_ids)
    if (images < 0).any():
        missing = reader.image_ids[int(np.argmax(images < 0))]
        raise UserError(
            f"{path}: image {missing!r} is not in {dataset.directory}, expected a table of its "
            "photos"
        )
    # Instances of an image and class lie together in this order.
    key = _key(dataset, instances.images, instances.classes)
    order = np.argsort(key, kind="stable")
    key = key[order]
    owners, boxes = [], []
    for chunk in reader.chunks(dataset.class_labels, rows=_ROWS):
        wanted = _key(dataset, images[chunk.image_index], chunk.label_index)
        low = np.searchsorted(key, wanted, "left")
        counts = np.searchsorted(key, wanted, "right") - low
        for part in pieces(counts, _PAIRS):
            owner, rows = _match(
                dataset, instances, order, chunk.boxes[part], low[part], counts[part]
            )
            owners.append(owner)
            boxes.append(chunk.boxes[part][rows])
    owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    if not len(owner):
        raise UserError(
            f"{path}: no box overlaps an instance of its label by IoU {MIN_IOU} (of "
            f"{reader.num_rows} boxes and {len(instances)} instances), expected detections of the "
            "training photos"
        )
    counts = np.bincount(owner, minlength=len(instances))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Matches(offsets, np.concatenate(boxes)[np.argsort(owner, kind="stable")])


def _key(
    dataset: Dataset, images: Int[np.ndarray, " m"], classes: Int[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    return np.asarray(images, np.int64) * dataset.num_classes + classes


def _match(
    dataset: Dataset,
    instances: Instances,
    order: Int64[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "d 4"],
    low: Int64[np.ndarray, " d"],
    counts: Int64[np.ndarray, " d"],
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Instance and row of the boxes that match one."""
    row, place = expand_ranges(low, counts)
    member = order[place]
    iou = _paired_iou(boxes[row], np.clip(dataset.boxes[instances.rows[member]], 0.0, 1.0))
    best = np.lexsort((member, -iou, row))
    _, first = np.unique(row[best], return_index=True)
    best = best[first]
    best = best[iou[best] >= MIN_IOU]
    return member[best], row[best]


def _paired_iou(a: Float32[np.ndarray, "m 4"], b: Float32[np.ndarray, "m 4"]) -> np.ndarray:
    """IoU of each pair; that of normalised boxes is that of the boxes in pixels."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    shared = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.maximum(shared, 0).prod(axis=1)
    union = sum(np.maximum(x[:, 2:] - x[:, :2], 0).prod(axis=1) for x in (a, b)) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
