"""Dataset directories some of whose training photos keep nothing but image-level labels.

Shape legend: N images, n of a split, K classes, L image-level labels.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from common.data.dataset import Dataset
from common.data.dataset_format import ABSENT, PRESENT
from common.data.dataset_writer import check_output
from common.data.plans.permutation import permute, stream_key
from common.io.atomic import atomic_folder, write_json
from common.io.errors import UserError
from common.tables.ranges import rows_of

BOXES, LABELS = "boxes", "labels"  # names of the splits
_STREAM = 1000  # of random numbers, beside those of training plans


class Halves(NamedTuple):
    """Image indices of the photos of a split, ascending."""

    boxes: Int64[np.ndarray, " b"]
    labels: Int64[np.ndarray, " l"]


def divide(dataset: Dataset, split: str, share: float, seed: int) -> Halves:
    """Which photos keep their boxes: a pure function of the order of the split, share and seed.

    Photos without boxes that have image-level labels are among the labelled ones whatever the
    share; with a share of 1 they are all of these.

    Args:
      dataset: with the split.
      split: training photos.
      share: of the photos that have boxes (or nothing at all) that keep them.
      seed: another one keeps other photos.

    Raises:
      UserError: no such split, or one of the halves would be empty.
    """
    images = dataset.split(split)
    with_boxes, with_labels = (
        offsets[images + 1] > offsets[images]
        for offsets in (dataset.box_offsets, dataset.label_offsets)
    )
    alone = with_labels & ~with_boxes
    annotated = images[~alone]
    order = permute(np.arange(len(annotated)), len(annotated), stream_key(seed, _STREAM))
    kept = order < round(share * len(annotated))
    halves = Halves(
        np.sort(annotated[kept]), np.sort(np.concatenate([annotated[~kept], images[alone]]))
    )
    for name, part in halves._asdict().items():
        if not len(part):
            raise UserError(
                f"{dataset.directory}: split {split!r} divided by a share of {share} has no photo "
                f"in the half {name!r}, expected some (--share)"
            )
    return halves


def write_half_labelled(
    dataset: Dataset, output: str | os.PathLike, split: str, halves: Halves, *, absent: bool
) -> None:
    """Writes the dataset again with the splits BOXES and LABELS.

    The photos of `split` get an image-level label of each class that they have a box of. What is
    there of boxes and masks stays: a source with annotations="labels" does not read it.

    Args:
      dataset: the source.
      output: directory to write, appears when complete.
      split: that `halves` are of.
      halves: see `divide`.
      absent: photos of `split` also get labels of all classes that they do not have, as absent: of
        sets in which every class is annotated everywhere (COCO).

    Raises:
      UserError: the output exists.
    """
    check_output(Path(output), overwrite=False)
    chosen = np.zeros(dataset.num_images, bool)
    chosen[dataset.split(split)] = True
    offsets, classes, confidences = _labels(dataset, chosen, absent)
    root = dataset.image_root
    meta = dict(dataset.meta) | {
        "name": f"{dataset.meta['name']}_half_labelled",
        "source": str(dataset.directory),
        "image_root": root if "://" in root else os.path.abspath(root),
        "num_labels": len(classes),
    }
    if dataset.mask_offsets is not None:
        masks = dataset.meta.get("mask_root") or str(dataset.directory)
        meta["mask_root"] = masks if "://" in masks else os.path.abspath(masks)
    with atomic_folder(output) as folder:
        shutil.copytree(dataset.directory, folder, dirs_exist_ok=True)
        for name, array in (
            ("label_offsets", offsets),
            ("label_class", classes),
            ("label_confidence", confidences),
        ):
            np.save(folder / "index" / f"{name}.npy", array)
        for name, images in ((BOXES, halves.boxes), (LABELS, halves.labels)):
            np.save(folder / "splits" / f"{name}.npy", images)
        write_json(folder / "dataset.json", meta)


def _labels(
    dataset: Dataset, chosen: Bool[np.ndarray, " N"], absent: bool
) -> tuple[Int64[np.ndarray, " N+1"], Int32[np.ndarray, " L"], UInt8[np.ndarray, " L"]]:
    """Offsets, classes and confidences of the labels: those that are there, then those of boxes,
    then absent ones; of a class that comes twice on an image the first counts."""
    everywhere, some = np.arange(dataset.num_images), np.flatnonzero(chosen)
    size = dataset.num_classes
    given, rows = rows_of(dataset.label_offsets, everywhere)
    boxed, boxes = rows_of(dataset.box_offsets, some)
    parts: list[tuple[np.ndarray, np.ndarray | int]] = [
        (given * size + dataset.label_classes[rows], np.asarray(dataset.label_confidences[rows])),
        (some[boxed] * size + dataset.box_classes[boxes], PRESENT),
    ]
    if absent:
        parts.append(((some[:, None] * size + np.arange(size)).ravel(), ABSENT))
    keys = np.concatenate([keys for keys, _ in parts])
    values = np.concatenate([np.broadcast_to(value, keys.shape) for keys, value in parts])
    keys, first = np.unique(keys, return_index=True)
    counts = np.bincount(keys // size, minlength=dataset.num_images)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, (keys % size).astype(np.int32), values[first].astype(np.uint8)
