"""Pixels to compressed counts and back.

Shape legend: n masks; H, W the image; h, w a window of it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from common.masks.rle.counts import Counts, Sizes, counts_of_ones, decode_runs

_PIXELS_PER_RUN = 150  # that np.repeat writes in the time of one assignment

Mask = Bool[np.ndarray, "h w"]


def encode(masks: Bool[np.ndarray, "n H W"] | Sequence[Mask]) -> list[bytes]:
    """Compressed counts of masks; the sizes may differ.

    Args:
      masks: bool, or other numbers of which all but 0 are foreground.
    """
    return encode_windows(masks, [(0, 0)] * len(masks), [np.shape(mask) for mask in masks])


def encode_window(mask: Mask, top: int, left: int, size: tuple[int, int]) -> bytes:
    """Counts of an image with one small mask in it; the cost is that of the window."""
    return encode_windows([mask], [(top, left)], [size])[0]


def encode_windows(
    masks: Bool[np.ndarray, "n h w"] | Sequence[Mask],
    corners: Int[np.ndarray, "n 2"] | Sequence[tuple[int, int]],
    sizes: Sizes,
) -> list[bytes]:
    """Counts of n images with one small mask in each, zero elsewhere.

    Args:
      masks: (h, w) each.
      corners: top and left of each in its image.
      sizes: height and width of each image.

    Raises:
      ValueError: a window that is not all inside its image.
    """
    if not len(masks):
        return []
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    starts, stops = [], []
    flags = np.empty(0, bool)
    for mask, (top, left), (height, width) in zip(
        masks, np.asarray(corners).reshape(-1, 2).tolist(), sizes.tolist(), strict=True
    ):
        mask = np.asarray(mask)
        rows, columns = mask.shape
        if not (0 <= top <= height - rows and 0 <= left <= width - columns):
            raise ValueError(
                f"window of {rows}x{columns} at {top}, {left} is not in {height}x{width}"
            )
        if flags.size < (needed := (rows + 1) * (columns + 1) + 8):
            flags = np.empty(needed, bool)  # once for all: fresh pages cost more than the rest
        column, row = _changes(mask if mask.dtype == bool else mask != 0, flags)
        edge = (column + left) * height + row + top
        starts.append(edge[0::2])
        stops.append(edge[1::2])
    owner = np.repeat(np.arange(len(masks)), [len(edge) for edge in starts])
    return counts_of_ones(owner, np.concatenate(starts), np.concatenate(stops), sizes.prod(1))


def _changes(
    mask: Mask, flags: Bool[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Column and row of pixels that differ from the one above; those below the last row count.

    Args:
      mask: pixels.
      flags: room for work.
    """
    turned = mask.flags.f_contiguous and not mask.flags.c_contiguous
    rows, columns = mask.shape
    if not mask.size:  # of an object that lies between the pixels of its image
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    size = (rows + 1) * columns
    used = -(-size // 8) * 8
    flags[size:used] = False
    if turned:
        edges = flags[:size].reshape(columns, rows + 1)
        edges[:, 0], edges[:, rows] = mask[0], mask[-1]
        np.not_equal(mask.T[:, 1:], mask.T[:, :-1], out=edges[:, 1:rows])
        return np.divmod(_places(flags[:used]), rows + 1)
    edges = flags[:size].reshape(rows + 1, columns)
    edges[0], edges[rows] = mask[0], mask[-1]
    np.not_equal(mask[1:], mask[:-1], out=edges[1:rows])
    # Few pixels differ: sorting those by columns is cheaper than turning the mask.
    row, column = np.divmod(_places(flags[:used]), columns)
    return np.divmod(np.sort(column * (rows + 1) + row), rows + 1)


def _places(flags: Bool[np.ndarray, " 8k"]) -> Int[np.ndarray, " p"]:
    """`np.flatnonzero` of few among many, eight at a time."""
    groups = np.flatnonzero(flags.view(np.int64) != 0)
    group, within = np.nonzero(flags.reshape(-1, 8)[groups])
    return 8 * groups[group] + within


def decode(counts: bytes, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Pixels of a mask (in Fortran order).

    Raises:
      ValueError: the counts are broken or of another size.
    """
    return decode_all([counts], size)[0]


def decode_all(counts: Counts, size: tuple[int, int]) -> Bool[np.ndarray, "n H W"]:
    """Pixels of masks of one size; each is in Fortran order.

    Raises:
      ValueError: counts that are broken or of another size.
    """
    height, width = size
    runs, offsets, broken = decode_runs(counts)
    total = np.concatenate([[0], np.cumsum(runs)])
    wrong = np.diff(total[offsets]) != height * width
    wrong[broken] = True
    if wrong.any():
        raise ValueError(f"mask {int(np.argmax(wrong))} is no code of {height}x{width} pixels")
    pixels = np.zeros((len(counts), width, height), bool)
    flat = pixels.reshape(-1)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        # From the first run of ones to the last.
        end = stop - (stop - start) % 2
        if end > start:
            first, last = total[start + 1], total[end]
            if last - first < _PIXELS_PER_RUN * (end - start) // 2:
                own = runs[start + 1 : end]
                flat[first:last] = np.repeat(np.arange(1, len(own) + 1) % 2 == 1, own)
            else:
                edges = total[start + 1 : end + 1].tolist()
                for begin, finish in zip(edges[0::2], edges[1::2], strict=True):
                    flat[begin:finish] = True
    return pixels.transpose(0, 2, 1)
