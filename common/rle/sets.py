"""Masks compared, united and brought to another frame without making pixels.

Shape legend: n, m masks; s runs of ones.
"""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import mask as coco_mask
from jaxtyping import Float, Int

from common.ranges import expand_ranges
from common.rle.counts import counts_of_ones, ones


def iou(
    a: Sequence[bytes],
    b: Sequence[bytes],
    size: tuple[int, int],
    *,
    of_a: bool | Sequence[bool] = False,
) -> Float[np.ndarray, "n m"]:
    """Overlap of every mask of `a` with every mask of `b`, all of one height and width.

    Args:
      a: (n,) compressed counts.
      b: (m,) compressed counts.
      size: height and width.
      of_a: divide the intersection by the area of `a`, as with COCO's crowds, instead of by the
        union; one choice, or one for each of `b`.

    Returns:
      Ratios in float64, 0 with an empty mask.
    """
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    sides = [int(side) for side in size]
    found, truth = ([{"size": sides, "counts": bytes(text)} for text in part] for part in (a, b))
    crowd = np.broadcast_to(of_a, len(b)).astype(int).tolist()
    return np.asarray(coco_mask.iou(found, truth, crowd), np.float64)


def merge(counts: Sequence[bytes], size: tuple[int, int], *, intersect: bool = False) -> bytes:
    """Counts of the union (or the intersection) of masks of one height and width."""
    _, starts, stops = ones(counts)
    needed = len(counts) if intersect else 1
    # Bit 0 tells a start from a stop, so that sorting numbers is enough.
    edges = np.concatenate([2 * starts + 1, 2 * stops])
    edges.sort()
    place = edges >> 1
    covered = np.cumsum(2 * (edges & 1) - 1) >= needed
    last = np.append(place[1:] != place[:-1], True)[: len(place)]
    place, covered = place[last], covered[last]
    changes = np.flatnonzero(np.diff(covered, prepend=False))
    begins, ends = place[changes[0::2]], place[changes[1::2]]
    owner = np.zeros(len(begins), np.int64)
    return counts_of_ones(owner, begins, ends, np.array([size[0] * size[1]]))[0]


def resize(
    counts: Sequence[bytes], size: tuple[int, int], new_size: tuple[int, int]
) -> list[bytes]:
    """Masks of one size brought to another by nearest sampling at the centres of its pixels."""
    if tuple(size) == tuple(new_size):
        return [bytes(text) for text in counts]
    (height, width), (new_height, new_width) = size, new_size
    owner, starts, stops = ones(counts)
    # Cut at the ends of columns.
    first = starts // height
    run, column = expand_ranges(first, (stops - 1) // height - first + 1)
    low = np.maximum(starts[run] - column * height, 0)
    high = np.minimum(stops[run] - column * height, height)
    # The new rows that sample old rows low..high - 1, and the new columns that sample this one.
    row_of, column_of = nearest(height, new_height), nearest(width, new_width)
    low, high = np.searchsorted(row_of, low), np.searchsorted(row_of, high)
    from_column = np.searchsorted(column_of, column)
    to_column = np.searchsorted(column_of, column, "right")
    kept = np.flatnonzero((high > low) & (to_column > from_column))
    piece, new_column = expand_ranges(from_column[kept], (to_column - from_column)[kept])
    piece = kept[piece]
    new_owner = owner[run[piece]]
    begin = new_column * new_height + low[piece]
    order = np.argsort(new_owner * (new_height * new_width) + begin, kind="stable")
    return counts_of_ones(
        new_owner[order],
        begin[order],
        (begin - low[piece] + high[piece])[order],
        np.full(len(counts), new_height * new_width),
    )


def nearest(length: int, new_length: int) -> Int[np.ndarray, " new_length"]:
    """Old pixel below the centre of each new one along one side."""
    return (2 * np.arange(new_length) + 1) * length // (2 * new_length)
