"""LVIS's matching of detections with the ground truth of their image and class.

At each IoU threshold and for each range of areas, detections choose in the order of their scores:
of the objects that none has chosen yet, that of the largest overlap; objects outside the range of
areas only where no other is left. Of equal overlaps the later object is taken, as officially. Only
pairs that overlap by the lowest threshold can matter: everything else here is done on those few.

Shape legend: m detections of some images, sorted by key (image * K + class), best scores first;
g their ground truth, sorted by key; p pairs of equal keys; c candidates of a detection; T IoU
thresholds, A ranges of areas.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from common.masks import rle
from common.tables.ranges import expand_ranges

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_RANGES = np.array([[0, 1e10], [0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, 1e10]])
_LEAST = np.minimum(THRESHOLDS, 1 - 1e-10)


class Shapes(NamedTuple):
    """Detections or ground truth of some images, sorted by key.

    Attributes:
      keys: image * K + class.
      shapes: (n, 4) x, y, width, height in pixels, or (n,) run lengths.
      areas: in pixels, of the segment where the data set tells it.
      sizes: (n, 2) height and width of the masks; None for boxes.
    """

    keys: Int[np.ndarray, " n"]
    shapes: np.ndarray
    areas: Float[np.ndarray, " n"]
    sizes: Int[np.ndarray, "n 2"] | None


def match(
    found: Shapes, truth: Shapes, forgiven: Bool[np.ndarray, " m"]
) -> tuple[Bool[np.ndarray, "m T A"], Bool[np.ndarray, "m T A"]]:
    """Which detections are right, and which count at all.

    Args:
      found: detections.
      truth: ground truth of the same images.
      forgiven: detections of classes that are not exhaustively labelled on their photo.

    Returns:
      right: true positives.
      counted: true and false positives; the others are ignored.
    """
    outside = outside_ranges(truth.areas)
    forgiven_or_outside = outside_ranges(found.areas) | forgiven[:, None]
    shape = (len(found.keys), len(THRESHOLDS), len(AREA_RANGES))
    right = np.zeros(shape, bool)
    counted = np.broadcast_to(~forgiven_or_outside[:, None, :], shape).copy()
    # The last row stands for no object: it is taken from the start.
    taken = np.zeros((len(truth.keys) + 1, *shape[1:]), bool)
    taken[-1] = True
    outside = np.append(outside, np.zeros((1, len(AREA_RANGES)), bool), axis=0)
    for rows, objects, overlaps in _rounds(found, truth):
        free = (overlaps[:, :, None] >= _LEAST)[..., None] & ~taken[objects]  # (n, c, T, A)
        inside = free & ~outside[objects][:, :, None, :]
        free = np.where(inside.any(axis=1, keepdims=True), inside, free)
        best = np.where(free, overlaps[:, :, None, None], -1.0).argmax(axis=1)  # (n, T, A)
        chosen = np.take_along_axis(objects, best.reshape(len(rows), -1), axis=1).reshape(
            best.shape
        )
        matches = np.nonzero(free.any(axis=1))
        n, threshold, area = matches
        taken[chosen[matches], threshold, area] = True
        ignored = outside[chosen[matches], area]
        right[rows[n], threshold, area] = ~ignored
        counted[rows[n], threshold, area] = ~ignored
    return right, counted


def outside_ranges(areas: Float[np.ndarray, " n"]) -> Bool[np.ndarray, "n A"]:
    """Whether an area is outside each of the ranges."""
    return (areas[:, None] < AREA_RANGES[:, 0]) | (areas[:, None] > AREA_RANGES[:, 1])


def _rounds(found: Shapes, truth: Shapes):
    """Detections that choose side by side, one of each key in a round, best scores first.

    Yields:
      rows (n,), their candidates (n, c), later objects first, and overlaps (n, c).
    """
    row, place, overlap = _overlapping(found, truth)
    if not len(row):
        return
    rows, first, counts = np.unique(row, return_index=True, return_counts=True)
    keys = found.keys[rows]
    positions = np.arange(len(rows))
    new = np.diff(keys, prepend=-1) != 0
    turn = positions - np.maximum.accumulate(np.where(new, positions, 0))
    for number in range(int(turn.max()) + 1):
        own = np.flatnonzero(turn == number)
        column = np.arange(int(counts[own].max()))
        pair = (first + counts - 1)[own, None] - column
        real = column < counts[own, None]
        objects = np.where(real, place[pair], len(truth.keys))
        yield rows[own], objects, np.where(real, overlap[pair], -1.0)


def _overlapping(
    found: Shapes, truth: Shapes
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Pairs that overlap by the lowest threshold: detection, object and IoU, in this order."""
    first = np.searchsorted(truth.keys, found.keys)
    counts = np.searchsorted(truth.keys, found.keys, "right") - first
    row, place = expand_ranges(first, counts)
    if found.sizes is None:
        overlap = _box_iou(found.shapes[row], truth.shapes[place])
    else:
        row, place, overlap = _mask_overlaps(found, truth, row, place)
    near = np.flatnonzero(overlap >= _LEAST[0])
    return row[near], place[near], overlap[near]


def _box_iou(a: Float[np.ndarray, "p 4"], b: Float[np.ndarray, "p 4"]) -> Float[np.ndarray, " p"]:
    """IoU of x, y, width, height."""
    low = np.maximum(a[:, :2], b[:, :2])
    sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - low
    common = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    return common / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - common)


def _mask_overlaps(
    found: Shapes, truth: Shapes, row: Int[np.ndarray, " p"], place: Int[np.ndarray, " p"]
) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """Pairs among those given, and their IoU: all that may reach the lowest threshold."""
    assert found.sizes is not None
    # An overlap is at most the ratio of the areas, and most pairs are of very different ones.
    pixels = rle.areas(truth.shapes)
    one, other = found.areas[row], pixels[place]
    row = np.unique(row[np.minimum(one, other) >= _LEAST[0] * np.maximum(one, other)])
    keys = found.keys[row]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(starts, len(row))[1:]
    first = np.searchsorted(truth.keys, keys[starts])
    last = np.searchsorted(truth.keys, keys[starts], "right")
    overlaps = [
        rle.iou(found.shapes[row[start:end]], truth.shapes[low:high], size).reshape(-1)
        for start, end, low, high, size in zip(
            *(limits.tolist() for limits in (starts, ends, first, last)),
            found.sizes[row[starts]].tolist(),
            strict=True,
        )
    ]
    of_row = np.repeat(np.arange(len(starts)), ends - starts)
    owner, places = expand_ranges(first[of_row], (last - first)[of_row])
    return row[owner], places, np.concatenate(overlaps) if overlaps else np.zeros(0)
