"""Which classes a detector takes for one another: counts of (annotated, detected) pairs.

Shape legend: n detections of a chunk, m ground-truth boxes of its images, K classes.
"""

import os

import numpy as np
from jaxtyping import Int64

from common.data.dataset import GROUP_OF, Dataset
from common.metrics.coverage import open_source, selected_chunks, split_images
from common.metrics.openimages import best_overlaps
from common.tables import Detections
from common.tables.hierarchy import ancestors
from common.tables.ranges import rows_of

_MIN_OVERLAP = 0.5  # IoU of a detection with the box that it is about


def confusion_matrix(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    min_score: float = 0.1,
    allow_partial: bool = False,
) -> Int64[np.ndarray, "K K"]:
    """Row: class as annotated; column: class of a detection that overlaps such a box.

    A detection that overlaps a box of its class, of an ancestor or of a descendant of it is right
    and counts on the diagonal of its class; any other counts for the box that it overlaps most.
    Detections that overlap no box count nowhere, group-of boxes are left out.

    Args:
      dataset: holds the ground truth as annotated and the hierarchy.
      split: images to compare.
      detections: table (file or folder of shards) or rows in memory.
      min_score: detections below are left out.
      allow_partial: compares the covered images of the split when others are missing.

    Raises:
      UserError: a broken table, unknown labels or images that are not covered.
    """
    source = open_source(detections)
    indices, _ = split_images(dataset, split, source, allow_partial)
    num_classes = dataset.num_classes
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    lineage = parents | parents.T | np.eye(num_classes, dtype=bool)
    counts = np.zeros((num_classes, num_classes), np.int64)
    for chunk in selected_chunks(source, dataset.class_labels, indices >= 0):
        sides = chunk.boxes[:, 2:] > chunk.boxes[:, :2]
        chunk = chunk.take((chunk.scores >= min_score) & sides.all(axis=1))
        codes, image = np.unique(chunk.image_index, return_inverse=True)
        owner, rows = rows_of(dataset.box_offsets, indices[codes])
        single = np.asarray(dataset.box_flags[rows]) & GROUP_OF == 0
        owner, rows = owner[single], rows[single]
        truth_classes = np.asarray(dataset.box_classes[rows], np.int64)
        truth_boxes = np.asarray(dataset.boxes[rows], np.float64)
        boxes, classes = chunk.boxes.astype(np.float64), chunk.label_index.astype(np.int64)

        # Its own family first: in OpenImages two classes often share an object.
        member, family = np.nonzero(lineage[truth_classes])
        keys = owner[member] * num_classes + family
        order = np.argsort(keys, kind="stable")
        overlap, _ = best_overlaps(
            boxes,
            image * num_classes + classes,
            truth_boxes[member[order]],
            keys[order],
            len(codes) * num_classes,
            union=True,
        )
        right = overlap >= _MIN_OVERLAP
        counts += np.diag(np.bincount(classes[right], minlength=num_classes))
        rest = np.flatnonzero(~right)
        overlap, best = best_overlaps(
            boxes[rest], image[rest], truth_boxes, owner, len(codes), union=True
        )
        taken = overlap >= _MIN_OVERLAP
        pairs = truth_classes[best[taken]] * num_classes + classes[rest[taken]]
        counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
    return counts
