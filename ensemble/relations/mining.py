"""Counts which classes are seen together and inside one another in a dataset (section 5.8).

Images are gone through in slabs, pairs in pieces, so memory does not grow with the data. Boxes
count for their class and all its ancestors. Pairs of a class and its ancestor, or of two ancestors
of one class, are left out: they follow from the hierarchy.

Verified: a class counts as absent from an image only if it was verified, by an image-level label
(a present class vouches for its ancestors, an absent one for its descendants) or by a box. Where
the dataset says that every class is labelled on every photo, all are.

Shape legend: I images of a slab, b its boxes, p its (image, class) pairs with a box, v its
(image, class) pairs verified, K classes.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.dataset import Dataset
from common.io.progress import Progress
from common.tables.hierarchy import ancestors, repeat_with
from common.tables.ranges import expand_ranges, pieces, rows_of
from ensemble.relations.counts import Relations
from ensemble.relations.rules import covered_share

SLAB = 1 << 15  # images
_MAX_JOINED = 1 << 20  # pairs looked at together


def mine_relations(
    dataset: Dataset,
    split: str,
    *,
    inside: float = 0.9,
    ignore_flags: int = 0,
    exhaustive: bool | None = None,
    say: Callable[[str], None] = print,
) -> Relations:
    """Counts the images and boxes behind P(i|j) and q(i in j).

    Args:
      dataset: opened dataset directory.
      split: images to learn from.
      inside: share of a box that must be covered by another one to lie inside it.
      ignore_flags: boxes with any of these bits (GROUP_OF, DEPICTION...) are left out.
      exhaustive: whether a class without a box counts as absent, verified or not; None asks the
        dataset. Where few of the absent classes were verified, P and q of verified images come out
        too high, and those of all images, if boxes are missing, too low.
      say: where progress lines go.

    Raises:
      UserError: no such split.
    """
    images = np.asarray(dataset.split(split), np.int64)
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    num_classes = dataset.num_classes
    counts = {
        name: np.zeros((num_classes, num_classes), np.int64)
        for name in ("images_both", "images_known", "boxes_inside", "boxes_known")
    }
    images_present, images_absent, box_counts = np.zeros((3, num_classes), np.int64)
    if exhaustive is None:
        exhaustive = bool(dataset.meta.get("exhaustive"))
    progress = Progress(len(images), what="mining", say=say)
    for start in range(0, len(images), SLAB):
        slab = images[start : start + SLAB]
        owner, rows = rows_of(dataset.box_offsets, slab)
        if ignore_flags:
            keep = np.asarray(dataset.box_flags[rows]) & ignore_flags == 0
            owner, rows = owner[keep], rows[keep]
        classes = np.asarray(dataset.box_classes[rows], np.int64)
        copies, expanded = repeat_with(classes, parents)
        present, boxes_per_pair = _counted(owner[copies] * num_classes + expanded)
        images_present += np.bincount(present % num_classes, minlength=num_classes)
        _count_pairs(counts["images_both"], present, present)
        if exhaustive:
            box_counts += np.bincount(expanded, minlength=num_classes)
        else:
            verified = _verified(dataset, slab, present, parents)
            images_absent += np.bincount(verified % num_classes, minlength=num_classes)
            _count_pairs(counts["images_known"], verified, present)
            _count_pairs(counts["boxes_known"], present, verified, boxes_per_pair)
        boxes = np.asarray(dataset.boxes[rows], np.float32)
        _count_inside(counts["boxes_inside"], owner, classes, boxes, parents, inside)
        done = start + len(slab)
        progress.report(done, last=done == len(images))
    if exhaustive:
        images_absent[:] = len(images)
        counts["images_known"] += images_present
        counts["boxes_known"] += box_counts[:, None]
    images_absent -= images_present
    # Classes with a common descendant, such as class and ancestor: its boxes are of both.
    lineage = (parents | np.eye(num_classes, dtype=bool)).astype(np.float32)
    related = lineage.T @ lineage > 0
    for matrix in counts.values():
        matrix[related] = 0
    meta = {
        "dataset": dataset.meta.get("name", ""),
        "split": split,
        "images": len(images),
        "inside": inside,
        "ignore_flags": ignore_flags,
        "exhaustive": exhaustive,
    }
    return Relations(
        list(dataset.class_labels),
        images_present=images_present,
        images_absent=images_absent,
        meta=meta,
        **counts,
    )


def _verified(
    dataset: Dataset,
    slab: Int[np.ndarray, " I"],
    present: Int[np.ndarray, " p"],
    parents: Bool[np.ndarray, "K K"],
) -> Int[np.ndarray, " v"]:
    """Sorted keys image * K + class of the classes verified in each image."""
    owner, rows = rows_of(dataset.label_offsets, slab)
    labels = np.asarray(dataset.label_classes[rows], np.int64)
    positive = np.asarray(dataset.label_confidences[rows]) > 0
    keys = [present]
    for side, relatives in ((positive, parents), (~positive, parents.T)):
        copies, expanded = repeat_with(labels[side], relatives)
        keys.append(owner[side][copies] * len(parents) + expanded)
    return _counted(np.concatenate(keys))[0]


def _counted(keys: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and how often each was there."""
    keys = np.sort(keys)
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.diff(np.append(first, len(keys)))


def _count_pairs(
    counts: Int[np.ndarray, "K K"],
    first: Int[np.ndarray, " a"],
    second: Int[np.ndarray, " b"],
    weights: Int[np.ndarray, " a"] | None = None,
) -> None:
    """Adds 1 (or the weight) to (i, j) for every image with i in `first` and j in `second`.

    Args:
      counts: added to in place.
      first, second: sorted keys image * K + class.
      weights: of each of `first`.
    """
    num_classes = len(counts)
    image, classes = np.divmod(second, num_classes)
    start = np.searchsorted(first, image * num_classes)
    size = np.searchsorted(first, (image + 1) * num_classes) - start
    first_class = first % num_classes
    for part in pieces(size, _MAX_JOINED):
        owner, other = expand_ranges(start[part], size[part])
        weight = None if weights is None else weights[other]
        _add(counts, first_class[other], classes[part][owner], weight)


def _add(counts: Int[np.ndarray, "K K"], rows, columns, weights=None) -> None:
    sums = np.bincount(rows * len(counts) + columns, weights, counts.size)
    counts += sums.astype(np.int64).reshape(counts.shape)


def _count_inside(
    counts: Int[np.ndarray, "K K"],
    owner: Int[np.ndarray, " b"],
    classes: Int[np.ndarray, " b"],
    boxes: Float[np.ndarray, "b 4"],
    parents: Bool[np.ndarray, "K K"],
    inside: float,
) -> None:
    """Adds to (i, j) the boxes of i that lie inside another box of j of their image."""
    num_classes = len(parents)
    if not len(owner):
        return
    sizes = np.bincount(owner)
    starts = np.cumsum(sizes) - sizes
    start, size = starts[owner], sizes[owner]
    for part in pieces(size, _MAX_JOINED):
        inner, outer = expand_ranges(start[part], size[part])
        inner += part.start
        within = (covered_share(boxes[inner], boxes[outer]) >= inside) & (inner != outer)
        inner, outer = inner[within], outer[within]
        # A box counts once for each class that surrounds it, with however many boxes.
        copies, surrounding = repeat_with(classes[outer], parents)
        distinct, _ = _counted(inner[copies] * num_classes + surrounding)
        inner, surrounding = np.divmod(distinct, num_classes)
        copies, own = repeat_with(classes[inner], parents)
        _add(counts, own, surrounding[copies])
