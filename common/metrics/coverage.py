"""What the metrics share: which images of a split a detections table covers, and its rows.

Shape legend: i images covered by a table.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.tables import Detections, DetectionsReader

MAX_IMAGES = 8192  # of a chunk, so that (images, classes) matrices stay small
_MASK_ROWS = 1 << 15  # of a chunk with masks, about a kilobyte each


def open_source(detections: str | os.PathLike | Detections) -> Detections | DetectionsReader:
    """Rows in memory as they are, or a checked reader of the table at a path."""
    return detections if isinstance(detections, Detections) else DetectionsReader(detections)


def split_images(
    dataset: Dataset, split: str, source: Detections | DetectionsReader, allow_partial: bool
) -> tuple[Int[np.ndarray, " i"], list[str]]:
    """Dataset index of each covered image, -1 for those outside the split, and notes to print."""
    wanted = dataset.split(split)
    indices = dataset.find_images(source.image_ids)
    indices = np.where(np.isin(indices, wanted), indices, -1)
    found = int((indices >= 0).sum())
    name = getattr(source, "path", "detections")
    if not found:
        ours = dataset.image_id(wanted[0]) if len(wanted) else "none"
        theirs = source.image_ids[0] if len(source.image_ids) else "none"
        raise UserError(
            f"{name}: none of its {len(source.image_ids)} images is in split {split!r} of "
            f"{dataset.directory} (first ids: {theirs!r} there, {ours!r} here)"
        )
    missing = np.setdiff1d(wanted, indices)
    notes = []
    if len(missing):
        text = (
            f"{name}: covers {found} of the {len(wanted)} images of split {split!r}, "
            f"{dataset.image_id(missing[0])!r} is missing"
        )
        if not allow_partial:
            raise UserError(f"{text}; score the covered ones with --allow_partial")
        notes.append(f"note: {text}: only the covered images are scored")
    if outside := len(indices) - found:
        notes.append(f"note: {name}: {outside} images outside split {split!r} are left out")
    return indices, notes


def selected_chunks(
    source: Detections | DetectionsReader,
    class_labels: list[str],
    selected: Bool[np.ndarray, " i"],
    *,
    masks: bool = False,
) -> Iterator[Detections]:
    """Chunks of whole images, at most MAX_IMAGES each, without images not `selected`."""
    rows = {"rows": _MASK_ROWS} if masks else {}
    if isinstance(source, Detections):
        if list(source.labels) != list(class_labels):
            raise ValueError("read the detections with class_labels=dataset.class_labels")
        if masks and source.masks is None:
            raise ValueError("read the detections with masks=True")
        chunks: Iterable[Detections] = source.chunks(**rows)
    else:
        chunks = source.chunks(class_labels, masks=masks, **rows)
    for chunk in chunks:
        chosen = selected[chunk.image_index]
        if not chosen.all():
            chunk = chunk.take(chosen)
        if not len(chunk):
            continue
        starts = np.flatnonzero(np.diff(chunk.image_index, prepend=-1))[::MAX_IMAGES]
        for start, stop in zip(starts, [*starts[1:], len(chunk)], strict=True):
            yield chunk.take(slice(start, stop))


def image_ranks(dataset: Dataset, images: Int[np.ndarray, " i"]) -> dict[int, int]:
    """Place of each image, from 1, in the order in which COCO's and LVIS's tools rank equal scores.

    That is by number where all ids are numbers, else the order of the dataset.
    """
    images = np.sort(images)
    ids = [dataset.image_id(i) for i in images.tolist()]
    if all(image_id.isascii() and image_id.isdecimal() for image_id in ids):
        images = images[np.argsort(np.array([int(i) for i in ids]), kind="stable")]
    return {image: rank for rank, image in enumerate(images.tolist(), start=1)}
