"""Masks compared, united and brought to another frame without making pixels.

Shape legend: n, m masks; s runs of ones.
"""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import mask as coco_mask
from jaxtyping import Bool, Float, Int

from common.masks.rle.counts import Counts, counts_of_ones, decode_runs, encode_runs, ones
from common.tables.ranges import expand_ranges


def iou(
    a: Counts,
    b: Counts,
    size: tuple[int, int],
    *,
    of_a: bool | Sequence[bool] | Bool[np.ndarray, " m"] = False,
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


def merge(counts: Counts, size: tuple[int, int], *, intersect: bool = False) -> bytes:
    """Counts of the union (or the intersection) of masks of one height and width."""
    if not len(counts):
        raise ValueError("no masks to merge")
    runs, offsets, _ = decode_runs(counts)
    pixels, lengths = size[0] * size[1], np.diff(offsets)
    # Overflow is harmless: what remains after subtracting the masks before is small.
    kind: type[np.signedinteger] = np.int32 if pixels < 2**31 else np.int64
    ends: np.ndarray = np.cumsum(runs, dtype=kind)
    ends -= np.repeat((pixels * np.arange(len(counts))).astype(kind), lengths)
    starting = np.arange(len(runs), dtype=np.int32) & 1 == 0  # where a run of zeros ends
    starting ^= np.repeat(offsets[:-1] % 2 == 1, lengths)
    begins, stops = (ends.take(np.flatnonzero(part)) for part in (starting, ~starting))
    begins.sort()
    stops.sort()
    begins = begins[: len(stops)]  # zeros up to the last pixel begin nothing
    if intersect:
        # The k-th to begin is the one that all are in if n - 1 fewer have stopped.
        fewer = len(counts) - 1
        begins, stops = begins[fewer:], stops[: max(len(stops) - fewer, 0)]
        own = np.flatnonzero(begins < stops)
        begins, stops = begins[own], stops[own]
    elif len(stops):
        # Nothing goes on where as many have stopped as have begun.
        gap = np.flatnonzero(stops[:-1] < begins[1:])
        begins = np.append(begins[0], begins[gap + 1])
        stops = np.append(stops[gap], stops[-1])
        own = np.flatnonzero(begins < stops)
        begins, stops = begins[own], stops[own]
    runs = np.empty(2 * len(begins) + 1, np.int64)
    runs[0:-1:2], runs[1::2], runs[-1] = begins, stops, pixels
    runs[1:] -= runs[:-1].copy()
    if len(runs) > 1 and not runs[-1]:
        runs = runs[:-1]
    return encode_runs(runs)


def resize(counts: Counts, size: tuple[int, int], new_size: tuple[int, int]) -> list[bytes]:
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
