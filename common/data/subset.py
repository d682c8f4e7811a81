"""Dataset directories made of some images and some classes of another one.

Shape legend: K classes of the source, C of them kept.
"""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from common.data.dataset import Dataset
from common.data.dataset_writer import DatasetWriter
from common.tables.hierarchy import restrict
from common.tables.ranges import rows_of

SLAB = 1 << 16  # images


def write_subset(
    dataset: Dataset,
    directory: str | os.PathLike,
    name: str,
    classes: Int[np.ndarray, " C"],
    splits: Mapping[str, Int[np.ndarray, " n"]],
    *,
    ignored: Int[np.ndarray, " n"] | None = None,
    overwrite: bool = False,
    finish: Callable[[DatasetWriter], None] = lambda writer: None,
) -> None:
    """Writes the images of `splits` with their boxes and image-level labels of `classes`.

    Images keep their order, ids and photos; those without such boxes stay, as background. Masks are
    left out. Ignore boxes stay, and boxes of `ignored` join them.

    Args:
      dataset: the source.
      directory: to write, appears when complete.
      name: of the new set.
      classes: indices of the classes to keep, in the new order.
      splits: name to image indices of the source.
      ignored: indices of classes whose objects may be some of `classes`, so no background.
      overwrite: replace an existing dataset directory.
      finish: called before the directory is completed, to add files.

    Raises:
      UserError: the output exists.
    """
    images = np.unique(np.concatenate([np.zeros(0, np.int64), *splits.values()]))
    new_class = np.full(dataset.num_classes, -1, np.int32)
    new_class[classes] = np.arange(len(classes))
    is_ignored = np.zeros(dataset.num_classes, bool)
    is_ignored[[] if ignored is None else ignored] = True
    has_ignore = dataset.ignore_offsets is not None or bool(is_ignored.any())
    labels = [dataset.class_labels[c] for c in classes]
    names = [dataset.class_names[c] for c in classes]
    root = dataset.image_root
    with DatasetWriter(
        directory,
        name,
        labels,
        names,
        restrict(dataset.hierarchy, labels),
        root if "://" in root else os.path.abspath(root),
        source=str(dataset.directory),
        has_areas=dataset.box_areas is not None,
        has_ignore=has_ignore,
        overwrite=overwrite,
        extra={"exhaustive": bool(dataset.meta.get("exhaustive"))},
    ) as writer:
        for start in range(0, len(images), SLAB):
            slab = images[start : start + SLAB]
            boxes, box_classes, box_counts = _kept(
                dataset.box_offsets, dataset.box_classes, slab, new_class
            )
            rows, label_classes, label_counts = _kept(
                dataset.label_offsets, dataset.label_classes, slab, new_class
            )
            ignore_boxes, ignore_counts = _ignore_boxes(dataset, slab, is_ignored)
            writer.add_images(
                _texts(dataset.image_ids[slab]),
                _texts(dataset.image_paths[slab]),
                np.asarray(dataset.image_sizes[slab]),
                box_counts,
                np.asarray(dataset.boxes[boxes]),
                box_classes,
                np.asarray(dataset.box_flags[boxes]),
                label_counts,
                label_classes,
                np.asarray(dataset.label_confidences[rows]),
                box_areas=None if dataset.box_areas is None else dataset.box_areas[boxes],
                ignore_counts=ignore_counts if has_ignore else None,
                ignore_boxes=ignore_boxes if has_ignore else None,
            )
        for split, indices in splits.items():
            writer.add_split(split, np.searchsorted(images, indices))
        finish(writer)


def _kept(
    offsets: np.ndarray, classes: np.ndarray, images: np.ndarray, new_class: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of kept classes, their new classes, and how many each image has."""
    owner, rows = rows_of(offsets, images)
    renamed = new_class[np.asarray(classes[rows])]
    kept = renamed >= 0
    return rows[kept], renamed[kept], np.bincount(owner[kept], minlength=len(images))


def _ignore_boxes(
    dataset: Dataset, images: np.ndarray, is_ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ignore boxes of the images and their boxes of ignored classes, and how many each has."""
    owner, rows = rows_of(dataset.box_offsets, images)
    kept = is_ignored[np.asarray(dataset.box_classes[rows])]
    owner, boxes = owner[kept], np.asarray(dataset.boxes[rows[kept]])
    if dataset.ignore_offsets is not None and dataset.ignore_boxes is not None:
        others, rows = rows_of(dataset.ignore_offsets, images)
        owner = np.concatenate([others, owner])
        boxes = np.concatenate([dataset.ignore_boxes[rows], boxes])
    order = np.argsort(owner, kind="stable")
    return boxes[order], np.bincount(owner, minlength=len(images))


def _texts(values: Sequence[bytes]) -> list[str]:
    return [value.decode() for value in values]
