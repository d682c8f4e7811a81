"""The OpenImages Challenge 2019 instance-segmentation metric, on run lengths, streamed.

As the detection metric (`common.metrics.openimages`: expansion, evaluated classes, ranking, AP),
with masks instead of boxes. In one image and class, best score first:

1. Each detection looks at the object with the largest mask IoU; at 0.5 or more the first to do so
   is true.
2. Of the others, those of which half or more lies inside a group-of mask are absorbed by it.
3. Of the others, those with a box IoU of 0.5 or more with an object that has a box and no mask:
   the first for each such box is ignored, neither true nor false.
4. Of the others, those of which half of the box lies in a group-of box without mask are ignored.

Only objects with masks are to be masks. The box of a detection is the tight one around its mask;
detections with empty masks are left out.

Masks of the truth have any resolution. They are compared in the frame of the image's detections
(all of one size), to which the truth is brought by nearest sampling at pixel centres; polygons are
drawn in it. A truth counts when it has a pixel in its own frame, so that the number of objects to
find does not depend on the detections.

Memory holds a few chunks of rows with their masks, plus 7 bytes per evaluated detection.

Shape legend: I images of a chunk, n its detections, N those after expansion, m its truth, e judged
detections, K classes, M boxes of the dataset.
"""

import os
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.io.parallel import map_ordered
from common.io.progress import Progress
from common.masks import rle
from common.masks.dataset_masks import MaskReader, same_shape
from common.metrics.coverage import checked_masks, open_split, selected_chunks
from common.metrics.matching import (
    ABSORBED,
    FALSE,
    TRUE,
    absorb,
    best_of_key,
    best_overlaps,
    claim,
    judged_rows,
)
from common.metrics.openimages import (
    Entries,
    Matches,
    Truth,
    average_precisions,
    count_truth,
    entries_of,
    gather_truth,
    named_figures,
)
from common.tables import Detections
from common.tables.hierarchy import ancestors, repeat_with
from common.tables.ranges import rows_of

MEAN_AP = "OpenImagesInstanceSegmentationChallenge_Precision/mAP@{:g}IOU"
CLASS_AP = "OpenImagesInstanceSegmentationChallenge_PerformanceByCategory/AP@{:g}IOU/{}"
_IMAGES = 256  # without detections, looked at together


def evaluate_openimages_masks(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    expand_truth: bool = True,
    expand_predictions: bool = False,
    image_labels: bool = True,
    allow_partial: bool = False,
    num_threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Official metric of a detections table with masks against a split.

    Args:
      dataset: holds the (unexpanded) ground truth with masks, verified labels and the hierarchy.
      split: images to score.
      detections: table (file or folder of shards) or rows in memory, with masks.
      iou_threshold: for overlaps of masks and boxes, reached or exceeded.
      group_of_weight: what a hit group-of mask counts as, and what each adds to the number of
        objects to find. The challenge has no group-of masks.
      expand_truth: see `openimages.evaluate_openimages`, as all that follow.
      expand_predictions: copy detections to ancestors first.
      image_labels: evaluate classes verified at image level.
      allow_partial: score the covered images of the split when others are missing.
      num_threads: chunks worked on at a time.
      say: where notes and progress go.

    Returns:
      {MEAN_AP: mean, CLASS_AP of label: AP of each class that has masks in the ground truth}.

    Raises:
      UserError: what `evaluate_openimages` refuses, a dataset without masks, a broken mask on
        either side, masks of several sizes in one image, or of another shape than the photo.
    """
    reader = MaskReader(dataset)
    source, indices, name = open_split(dataset, split, detections, allow_partial, say)
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    relatives = parents if expand_truth else np.zeros_like(parents)
    expand = expand_predictions and not source.metadata.get("expanded")
    filled = np.zeros(len(dataset.boxes), bool)  # boxes with a mask that has pixels

    def score_chunk(chunk: Detections) -> tuple[Entries, np.ndarray]:
        codes, image_index = np.unique(chunk.image_index, return_inverse=True)
        sizes = _frames(chunk, dataset, indices[codes], image_index, name)
        truth = gather_truth(dataset, indices[codes], relatives, image_labels)
        masks = _Masks(chunk, image_index, sizes)
        objects = _Objects(reader, truth, sizes, dataset.num_classes)
        filled[objects.rows] = True
        if expand:
            copies, classes = repeat_with(chunk.label_index, parents)
        else:
            copies, classes = np.arange(len(chunk)), chunk.label_index
        scores = chunk.scores[copies]
        matches = match_masks(truth, filled, masks, objects, copies, classes, scores, iou_threshold)
        entries, _ = entries_of(matches, truth, scores, dataset.num_classes, group_of_weight)
        return entries, codes

    chunks = selected_chunks(source, dataset.class_labels, indices >= 0, masks=True)
    parts, seen = [], np.zeros(len(indices), bool)
    progress = Progress(int((indices >= 0).sum()), what="scoring", say=say)
    for entries, codes in map_ordered(score_chunk, chunks, threads=num_threads, ahead=num_threads):
        parts.append(entries)
        seen[codes] = True
        progress.report(int(seen.sum()))
    rest = indices[(indices >= 0) & ~seen]
    pieces = (rest[start : start + _IMAGES] for start in range(0, len(rest), _IMAGES))
    filled_rows = map_ordered(
        lambda part: _filled_rows(reader, dataset, part),
        pieces,
        threads=num_threads,
        ahead=num_threads,
    )
    for rows in filled_rows:
        filled[rows] = True
    counts = count_truth(dataset, indices[indices >= 0], relatives, group_of_weight, filled)
    if not counts.any():
        raise UserError(f"{dataset.directory}: split {split!r} has no ground-truth masks")
    aps = average_precisions(parts, counts, group_of_weight)
    return named_figures(dataset, aps, MEAN_AP.format(iou_threshold), CLASS_AP, iou_threshold)


def _frames(
    chunk: Detections,
    dataset: Dataset,
    images: Int[np.ndarray, " I"],
    image_index: Int[np.ndarray, " n"],
    name: str,
) -> Int[np.ndarray, "I 2"]:
    """Height and width of the masks of each image; refuses broken ones and several sizes."""
    _, mask_sizes, _ = checked_masks(chunk, name)
    _, first = np.unique(image_index, return_index=True)
    sizes = np.asarray(mask_sizes[first], np.int64)
    other = np.any(mask_sizes != sizes[image_index], axis=1)
    if other.any():
        row = int(np.argmax(other))
        height, width = sizes[image_index[row]]
        raise UserError(
            f"{name}: image {chunk.image_ids[chunk.image_index[row]]!r} has masks of "
            f"{height}x{width} and of {mask_sizes[row, 0]}x{mask_sizes[row, 1]} "
            "(height x width), expected one size"
        )
    photos = dataset.image_sizes[images].tolist()
    for place, (size, photo) in enumerate(zip(sizes.tolist(), photos, strict=True)):
        if all(photo) and not same_shape(size, photo):
            raise UserError(
                f"{name}: image {dataset.image_id(images[place])!r} has masks of "
                f"{size[0]}x{size[1]} (height x width), expected the shape of the photo, "
                f"{photo[0]}x{photo[1]}, at any resolution"
            )
    return sizes


class _Masks:
    """Masks of the n detections of a chunk.

    Attributes:
      counts: compressed run lengths.
      image_index: place of the image of each.
      boxes: (n, 4) tight, normalised; without sides for an empty mask.
    """

    def __init__(
        self, chunk: Detections, image_index: Int[np.ndarray, " n"], sizes: Int[np.ndarray, "I 2"]
    ):
        assert chunk.masks is not None
        self.counts: list[bytes] = chunk.masks.tolist()
        self.image_index = image_index
        sides = sizes[image_index][:, [1, 0, 1, 0]]
        self.boxes = rle.tight_boxes(self.counts, sizes[image_index]) / sides


class _Objects:
    """Masks of the ground truth of I images, each once, however many ancestors its class has.

    Attributes:
      rows: of `dataset.boxes`, of those with pixels, ascending within an image.
      sizes: (I, 2) height and width of the frames.
    """

    def __init__(
        self, reader: MaskReader, truth: Truth, sizes: Int[np.ndarray, "I 2"], num_classes: int
    ):
        self.sizes = sizes
        unique, first = np.unique(truth.rows, return_index=True)
        image = truth.keys[first] // num_classes
        masked = reader.has_mask(unique)
        rows, images, group_of, self._counts = [], [], [], []
        for row, place, group in zip(
            unique[masked].tolist(),
            image[masked].tolist(),
            truth.group_of[first][masked].tolist(),
            strict=True,
        ):
            height, width = sizes[place].tolist()
            counts = reader.rle(row, (height, width))
            if counts is not None:
                rows.append(row)
                images.append(place)
                group_of.append(group)
                self._counts.append(counts)
        self.rows = np.array(rows, np.int64)
        self._group_of = np.array(group_of, bool)
        owner = np.array(images, np.int64)
        self._order = np.argsort(owner, kind="stable")
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(sizes)))])
        self._column = np.zeros(len(rows), np.int64)  # place among the objects of the image
        self._column[self._order] = np.arange(len(rows)) - self._offsets[owner[self._order]]

    def overlaps(
        self, masks: _Masks, wanted: Bool[np.ndarray, " n"]
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Compares the wanted detections with all objects of their images.

        Returns:
          A function of detections and rows of `dataset.boxes`, pair by pair. It gives their IoUs,
          and for group-of objects the share of the detection that lies inside.
        """
        base = np.zeros(len(masks.counts), np.int64)
        tables, used = [], 0
        detections = np.flatnonzero(wanted)
        ends = np.searchsorted(masks.image_index[detections], np.arange(len(self.sizes) + 1))
        for place in range(len(self.sizes)):
            mine = detections[ends[place] : ends[place + 1]]
            theirs = self._order[self._offsets[place] : self._offsets[place + 1]]
            if not len(mine) or not len(theirs):
                continue
            # Copies of a detection for its ancestors are compared once.
            different: dict[bytes, int] = {}
            code = [different.setdefault(masks.counts[i], len(different)) for i in mine.tolist()]
            table = rle.iou(
                list(different),
                [self._counts[i] for i in theirs.tolist()],
                tuple(self.sizes[place].tolist()),
                of_a=self._group_of[theirs].tolist(),
            )
            base[mine] = used + np.array(code) * len(theirs)
            tables.append(table.reshape(-1))
            used += table.size
        flat = np.concatenate([np.zeros(0), *tables])

        def measure(detection: np.ndarray, row: np.ndarray) -> np.ndarray:
            return flat[base[detection] + self._column[np.searchsorted(self.rows, row)]]

        return measure


def match_masks(
    truth: Truth,
    filled: Bool[np.ndarray, " M"],
    masks: _Masks,
    objects: _Objects,
    copies: Int[np.ndarray, " N"],
    classes: Int[np.ndarray, " N"],
    scores: Float[np.ndarray, " N"],
    iou_threshold: float,
) -> Matches:
    """What becomes of each detection of whole images, sorted by image, then score descending.

    Ignored detections are ABSORBED; `groups` holds the group-of masks that were hit.

    Args:
      truth: of the images.
      filled: which of `dataset.boxes` have masks with pixels.
      masks: of the detections before expansion.
      objects: masks of the truth.
      copies: detection that each expanded one comes from, non-decreasing.
      classes: of the expanded detections.
      scores: of the expanded detections.
      iou_threshold: for all overlaps.
    """
    rows, keys = judged_rows(
        truth.evaluated, masks.image_index[copies], classes, masks.boxes[copies]
    )
    scores, boxes = scores[rows], masks.boxes[copies[rows]]
    num_keys = truth.evaluated.size
    masked = filled[truth.rows]
    single, group, box_single, box_group = (
        np.flatnonzero(part & side)
        for part in (masked, ~masked)
        for side in (~truth.group_of, truth.group_of)
    )
    wanted = np.zeros(len(masks.counts), bool)
    has_masks = np.bincount(truth.keys[masked], minlength=num_keys) > 0
    wanted[copies[rows[has_masks[keys]]]] = True
    measure = objects.overlaps(masks, wanted)

    def best_masks(which, candidates):
        detection, row = copies[rows[which]], truth.rows[candidates]
        return best_of_key(
            keys[which],
            truth.keys[candidates],
            num_keys,
            lambda active, pair: measure(detection[active], row[pair]),
        )

    def best_boxes(which, candidates, union):
        return best_overlaps(
            boxes[which],
            keys[which],
            truth.boxes[candidates],
            truth.keys[candidates],
            num_keys,
            union=union,
        )

    kinds = np.full(len(rows), FALSE, np.int8)
    everything = np.arange(len(rows))
    overlaps, best = best_masks(everything, single)
    claim(kinds, overlaps, best, iou_threshold, TRUE)
    rest = np.flatnonzero(kinds == FALSE)
    shares, best_group = best_masks(rest, group)
    group_scores = absorb(kinds, rest, shares, best_group, iou_threshold, scores, len(group))

    box_overlaps, best_box = best_boxes(everything, box_single, True)
    claim(kinds, box_overlaps, best_box, iou_threshold, ABSORBED)
    rest = np.flatnonzero(kinds == FALSE)
    shares, best_box = best_boxes(rest, box_group, False)
    absorb(kinds, rest, shares, best_box, iou_threshold, scores, len(box_group))

    hit = group_scores > 0
    matched_idx = np.full(len(rows), -1, np.int64)
    matched_idx[overlaps >= 0] = single[best[overlaps >= 0]]
    return Matches(rows, keys, kinds, overlaps, matched_idx, group[hit], group_scores[hit])


def _filled_rows(
    reader: MaskReader, dataset: Dataset, images: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " m"]:
    """Rows of `dataset.boxes` of these images whose masks have pixels."""
    _, rows = rows_of(dataset.box_offsets, images)
    rows = rows[reader.has_mask(rows)]
    return rows[[not reader.is_empty(row) for row in rows.tolist()]] if len(rows) else rows
