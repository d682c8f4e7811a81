"""Sizes and shapes of the boxes of a training set, found once and kept with the dataset.

Shape legend: n boxes or images, C classes of a dataset, N bins of `BoxShapes.ratios`.
"""

import contextlib
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32, Int64

from common.data.dataset import Dataset
from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.npz_file import read_npz
from common.tables.ranges import rows_of

# Of photos whose size the dataset does not know, until they are opened: most are like this.
ASSUMED_SIZE = (768, 1024)
RATIO_BINS = 1000  # of equal width between 0 and 1

_CHUNK = 1 << 16  # images looked at at once
_VERSION = 2  # of what is kept


class BoxShapes(NamedTuple):
    """What the boxes of some images of a dataset are like, in pixels.

    Attributes:
      ratios: how many boxes have a longer side of i/N to (i + 1)/N of their photo's longer side.
      counts: boxes of each class that have an area.
      aspects: median of their long side over their short side; 1 without any.
    """

    ratios: Int64[np.ndarray, " N"]
    counts: Int64[np.ndarray, " C"]
    aspects: Float[np.ndarray, " C"]


def box_shapes(dataset: Dataset, images: Int64[np.ndarray, " n"], ignore_flags: int) -> BoxShapes:
    """The shapes of the boxes of some images.

    They are kept in `DATASET/statistics/`, where it may be written, under a name that says of which
    images and of which annotations they are.

    Args:
      dataset: of the images.
      images: such as those of a split.
      ignore_flags: boxes with any of these bits do not count.
    """
    images = np.ascontiguousarray(images, np.int64)
    digest = hashlib.blake2b(images.tobytes(), digest_size=8)
    digest.update(np.array([_VERSION, ignore_flags, _checksum(dataset)]).tobytes())
    path = dataset.directory / "statistics" / f"box_shapes_{digest.hexdigest()}.npz"
    if (kept := _read(path)) is not None and len(kept.counts) == dataset.num_classes:
        return kept
    shapes = find_box_shapes(dataset, images, ignore_flags)
    # A dataset that may not be written is looked through at each start.
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with open_atomic(path, "wb") as file:
            np.savez(file, **shapes._asdict())
    return shapes


def _checksum(dataset: Dataset) -> int:
    """Of all that shapes are found by; 14.6 M boxes take 0.3 s, beside reading them."""
    found = 0
    for array in (
        dataset.boxes,
        dataset.box_classes,
        dataset.box_flags,
        dataset.box_offsets,
        dataset.image_sizes,
    ):
        found = zlib.crc32(array.data, found)
    return found


def _read(path: Path) -> BoxShapes | None:
    """What is kept; None without, or where it is damaged."""
    try:
        return BoxShapes(**read_npz(path))
    except (OSError, UserError, TypeError):
        return None


def find_box_shapes(
    dataset: Dataset, images: Int64[np.ndarray, " n"], ignore_flags: int
) -> BoxShapes:
    """As `box_shapes`, out of the index itself: 1.74 M photos with 14.6 M boxes take seconds."""
    ratios = np.zeros(RATIO_BINS, np.int64)
    classes, aspects = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first in range(0, len(images), _CHUNK):
        part = images[first : first + _CHUNK]
        owner, rows = rows_of(dataset.box_offsets, part)
        sizes = photo_sizes(dataset, part)
        sides = pixel_sides(dataset.boxes[rows], sizes[owner])
        keep = sides.min(axis=1) > 0
        if ignore_flags:
            keep &= np.asarray(dataset.box_flags[rows]) & ignore_flags == 0
        sides, owner = sides[keep], owner[keep]
        longer, shorter = sides.max(axis=1), sides.min(axis=1)
        place = (longer / sizes.max(axis=1)[owner] * RATIO_BINS).astype(np.int64)
        ratios += np.bincount(np.minimum(place, RATIO_BINS - 1), minlength=RATIO_BINS)
        classes.append(np.asarray(dataset.box_classes[rows[keep]]))
        aspects.append((longer / shorter).astype(np.float32))
    return BoxShapes(
        ratios, *medians(np.concatenate(classes), np.concatenate(aspects), dataset.num_classes)
    )


def photo_sizes(dataset: Dataset, images: Int[np.ndarray, " n"]) -> Int32[np.ndarray, "n 2"]:
    """Heights and widths of photos, assumed ones where the dataset does not know them."""
    sizes = dataset.image_sizes[images]
    return np.where((sizes > 0).all(axis=1, keepdims=True), sizes, np.array(ASSUMED_SIZE, np.int32))


def pixel_sides(
    boxes: Float[np.ndarray, "n 4"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n 2"]:
    """Width, height in pixels of normalised boxes in photos of these heights and widths."""
    clipped = np.clip(boxes, 0.0, 1.0)
    return (clipped[:, 2:] - clipped[:, :2]) * np.asarray(sizes)[:, ::-1]


def medians(
    classes: Int[np.ndarray, " n"], aspects: Float[np.ndarray, " n"], num_classes: int
) -> tuple[Int64[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Number and median (1 without any) of the positive values of each class."""
    # Positive floats are ordered as their bits are: one fast sort of whole numbers for all classes.
    bits = np.asarray(aspects, np.float32).view(np.uint32).astype(np.uint64)
    keys = np.sort(np.asarray(classes).astype(np.uint64) << np.uint64(32) | bits)
    ordered = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    counts = np.bincount(classes, minlength=num_classes)
    starts = np.cumsum(counts) - counts
    result = np.ones(num_classes)
    there = np.flatnonzero(counts)
    low, high = starts[there] + (counts[there] - 1) // 2, starts[there] + counts[there] // 2
    result[there] = (ordered[low].astype(np.float64) + ordered[high]) / 2
    return counts, result
