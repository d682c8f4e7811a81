"""What the metrics share: which images of a split a detections table covers, and its rows.

Shape legend: i images covered by a table.
"""

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.masks import rle
from common.tables import Detections, DetectionsReader

MAX_IMAGES = 8192  # of a chunk, so that (images, classes) matrices stay small
_ROWS, _MASK_ROWS = 1 << 19, 1 << 15  # of a chunk without and with masks, of a kilobyte each


def open_split(
    dataset: Dataset,
    split: str,
    detections: str | os.PathLike | Detections,
    allow_partial: bool,
    say: Callable[[str], None] = print,
) -> tuple[Detections | DetectionsReader, Int[np.ndarray, " i"], str]:
    """Opens a table that is scored on a split: rows in memory as they are, or a checked reader.

    Returns:
      The rows or reader, the dataset index of each covered image (-1 for those outside the split),
      and what messages call the table.
    """
    source = open_source(detections)
    indices, notes = split_images(dataset, split, source, allow_partial)
    for line in notes:
        say(line)
    return source, indices, table_name(source)


def table_name(source: Detections | DetectionsReader) -> str:
    """What messages call a table: its path, if it was read from one."""
    return "detections" if isinstance(source, Detections) else str(source.path)


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
    num_covered = int((indices >= 0).sum())
    name = table_name(source)
    if not num_covered:
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
            f"{name}: covers {num_covered} of the {len(wanted)} images of split {split!r}, "
            f"{dataset.image_id(missing[0])!r} is missing"
        )
        if not allow_partial:
            raise UserError(f"{text}; score the covered ones with --allow_partial")
        notes.append(f"note: {text}: only the covered images are scored")
    if outside := len(indices) - num_covered:
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
    rows = _MASK_ROWS if masks else _ROWS
    if isinstance(source, Detections):
        if list(source.labels) != list(class_labels):
            raise ValueError("read the detections with class_labels=dataset.class_labels")
        if masks and source.masks is None:
            raise ValueError("read the detections with masks=True")
        chunks: Iterable[Detections] = source.chunks(rows)
    else:
        chunks = source.chunks(class_labels, masks=masks, rows=rows)
    for chunk in chunks:
        chosen = selected[chunk.image_index]
        if not chosen.all():
            chunk = chunk.take(chosen)
        if not len(chunk):
            continue
        starts = np.flatnonzero(np.diff(chunk.image_index, prepend=-1))[::MAX_IMAGES]
        for start, stop in zip(starts, [*starts[1:], len(chunk)], strict=True):
            yield chunk.take(slice(start, stop))


def checked_masks(
    chunk: Detections, name: str
) -> tuple[np.ndarray, Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Compressed run lengths of a chunk's masks, their heights and widths, and their areas.

    Raises:
      UserError: a mask is no run lengths; names the image.
      ValueError: the chunk was read without masks.
    """
    if chunk.masks is None or chunk.mask_sizes is None:
        raise ValueError("read the detections with masks=True")
    areas, broken = rle.checked_areas(chunk.masks, chunk.mask_sizes)
    if broken is not None:
        row, reason = broken
        image_id = chunk.image_ids[chunk.image_index[row]]
        raise UserError(f"{name}: image {image_id!r}: {reason}")
    return chunk.masks, chunk.mask_sizes, areas


def image_ranks(dataset: Dataset, images: Int[np.ndarray, " i"]) -> dict[int, int]:
    """Place of each image, from 1, in the order in which COCO's and LVIS's tools rank equal scores.

    That is by number where all ids are numbers, else the order of the dataset.
    """
    images = np.sort(images)
    ids = [dataset.image_id(i) for i in images.tolist()]
    if all(image_id.isascii() and image_id.isdecimal() for image_id in ids):
        images = images[np.argsort(np.array([int(i) for i in ids]), kind="stable")]
    return {image: rank for rank, image in enumerate(images.tolist(), start=1)}
