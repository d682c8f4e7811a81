"""From the probability maps of a box to its mask in the pixels of the photo.

A pixel of the photo belongs to a box when its centre lies inside. There it takes the value of the
bilinear interpolation of each voter's map, whose content covers the box exactly, and
`common.masks.vote` makes foreground or background of these values. Between the centre of a map's
outermost cells and the border of the box, maps of crops (`paste`) keep the value of the cell, those
of mask heads (`box_masks`) fall towards zeros outside, as Mask R-CNN's are pasted.

Only pixels near an outline, or where voters disagree, have to be interpolated: where the four map
cells around a pixel are above the threshold in all maps, so is all that lies between them. The
masks are those of interpolating every pixel, bit for bit.

Shapes: V voters of a view, Y X canvas, h w content of a crop, H W pixels of the photo that belong
to the box, n of them (or n boxes of a photo), S S map of a mask head.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8, UInt16

from common.masks import rle, vote
from common.masks.probability import PROBABILITY_ONE

PASTING_THREADS = 4  # NumPy lets them run side by side

_SMALL_PRODUCT = 1 << 17  # multiplications; OpenBLAS starts threads from about 2^18 on
_ABOVE, _BELOW = 1, 2  # bits: surely on that side of the threshold


def pixel_window(
    windows: Float[np.ndarray, "b 4"], photo_sizes: Int[np.ndarray, "b 2"]
) -> Int[np.ndarray, "b 4"]:
    """Top, left, bottom, right (half-open) of the pixels whose centres lie in boxes.

    A box so thin that no centre lies in it gets the pixels that it lies in.

    Args:
      windows: xmin, ymin, xmax, ymax in pixels of the photo, continuous.
      photo_sizes: height, width.
    """
    boxes = np.asarray(windows, np.float64)[:, [1, 0, 3, 2]]
    limits = np.asarray(photo_sizes, np.int64)
    middle = np.floor((boxes[:, :2] + boxes[:, 2:]) / 2)
    low, high = np.ceil(boxes - 0.5)[:, :2], np.ceil(boxes - 0.5)[:, 2:]
    low, high = np.where(high > low, low, middle), np.where(high > low, high, middle + 1)
    low = np.clip(low, 0, np.maximum(limits - 1, 0))
    return np.concatenate([low, np.clip(high, low + 1, np.maximum(limits, 1))], 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class CropMaps:
    """The probability maps that voters made of one crop of a box.

    Attributes:
      values: PROBABILITY_ONE is 1; the content is at the top left of the canvas.
      content: height and width of the content.
      window: what the content shows: xmin, ymin, xmax, ymax in pixels of the photo, continuous.
    """

    values: UInt16[np.ndarray, "V Y X"]
    content: tuple[int, int]
    window: Float[np.ndarray, " 4"]


def paste(
    crops: Sequence[CropMaps],
    pixels: Int[np.ndarray, " 4"],
    rule: vote.Rule,
    threshold: float,
    weights: Sequence[int] | None = None,
) -> Bool[np.ndarray, "H W"]:
    """The mask of a box in its pixels of the photo, in Fortran order.

    Args:
      crops: of the box, one a view.
      pixels: top, left, bottom, right from `pixel_window`.
      rule, threshold, weights: of `vote.combine`, whose maps are those of all crops in turn.
    """
    top, left, bottom, right = (int(side) for side in pixels)
    grids = [PixelGrid.of(crop, range(top, bottom), range(left, right)) for crop in crops]
    sides = grids[0].sides(threshold)
    for grid in grids[1:]:
        sides &= grid.sides(threshold)
    mask = sides == _ABOVE
    unsure = np.flatnonzero(sides == 0)
    if len(unsure):
        columns, rows = np.divmod(unsure, bottom - top)
        values = np.concatenate([grid.interpolate(rows, columns) for grid in grids])
        values *= np.float32(1 / PROBABILITY_ONE)
        mask.reshape(-1)[unsure] = vote.combine(values, rule, threshold, weights)
    return mask.T


def box_masks(
    maps: UInt16[np.ndarray, "n S S"],
    boxes: Float[np.ndarray, "n 4"],
    photo_size: tuple[int, int],
    threshold: float,
) -> list[bytes]:
    """Compressed counts of the masks of the boxes of a photo, from the maps of a mask head.

    Args:
      maps: PROBABILITY_ONE is 1; each covers its box.
      boxes: with an area, in pixels of the photo, continuous, clipped to it.
      photo_size: height, width of the photo and of the masks.
      threshold: that a probability must exceed.
    """
    sizes = np.tile(np.asarray(photo_size, np.int64), (len(boxes), 1))
    pixels = pixel_window(boxes, sizes)
    level = np.float32(threshold * PROBABILITY_ONE)
    masks = []
    for values, box, window in zip(maps, np.asarray(boxes, np.float64), pixels, strict=True):
        (xmin, ymin, xmax, ymax), (top, left, bottom, right) = box.tolist(), window.tolist()
        rows = _hats(range(top, bottom), ymin, ymax, len(values))
        columns = _hats(range(left, right), xmin, xmax, len(values))
        lines = _product(columns, values.T.astype(np.float32))
        masks.append((_product(lines, rows.T) > level).T)
    return rle.encode_windows(masks, pixels[:, :2], sizes)


def _hats(pixels: range, low: float, high: float, cells: int) -> Float32[np.ndarray, "n S"]:
    """Weights of the cells of a map over low ... high at pixel centres, with zeros outside.

    A product with them interpolates: for maps this small it is faster than finding the few pixels
    near an outline.
    """
    centres = np.arange(pixels.start, pixels.stop) + 0.5
    centres = (centres - low) * (cells / max(high - low, 1e-9)) - 0.5
    return np.maximum(1 - abs(centres[:, None] - np.arange(cells)), 0).astype(np.float32)


def _product(
    a: Float32[np.ndarray, "n S"], b: Float32[np.ndarray, "S m"]
) -> Float32[np.ndarray, "n m"]:
    """a @ b in pieces so small that the linear algebra library starts no threads of its own."""
    step = max(_SMALL_PRODUCT // b.size, 1)
    padded = np.zeros((-(-len(a) // step), step, a.shape[1]), np.float32)
    padded.reshape(-1, a.shape[1])[: len(a)] = a
    return (padded @ b).reshape(-1, b.shape[1])[: len(a)]


@dataclasses.dataclass(frozen=True)
class _Taps:
    """The two map cells around each pixel centre along one side, and the weight of the second."""

    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    share: Float32[np.ndarray, " n"]

    @classmethod
    def of(cls, pixels: range, low: float, high: float, cells: int) -> "_Taps":
        """Taps of pixels of the photo in a map whose `cells` cover low ... high."""
        centres = np.arange(pixels.start, pixels.stop) + 0.5
        centres = (centres - low) * (cells / max(high - low, 1e-9)) - 0.5
        centres = np.clip(centres, 0, cells - 1)
        first = centres.astype(np.int64)
        share = (centres - first).astype(np.float32)
        return cls(first, np.minimum(first + 1, cells - 1), share)


@dataclasses.dataclass(frozen=True)
class PixelGrid:
    """Where the pixels of a box lie in the maps of one crop.

    Attributes:
      maps: of the crop.
      rows: taps of the H rows of pixels.
      columns: taps of the W columns.
    """

    maps: CropMaps
    rows: _Taps
    columns: _Taps

    @classmethod
    def of(cls, maps: CropMaps, rows: range, columns: range) -> "PixelGrid":
        """The grid of these rows and columns of the photo."""
        xmin, ymin, xmax, ymax = (float(side) for side in maps.window)
        height, width = maps.content
        return cls(maps, _Taps.of(rows, ymin, ymax, height), _Taps.of(columns, xmin, xmax, width))

    def sides(self, threshold: float) -> UInt8[np.ndarray, "W H"]:
        """_ABOVE where no value of any map between a pixel's four cells can be at the threshold or
        below, _BELOW where none can exceed it, 0 where only interpolating tells."""
        height, width = self.maps.content
        values = self.maps.values[:, :height, :width]
        # Rounding in `interpolate` is far less than the step of 1 / PROBABILITY_ONE left free here.
        at = threshold * PROBABILITY_ONE
        cells = (values.min(0) > math.floor(at) + 1).view(np.uint8)  # _ABOVE
        cells |= _BELOW * (values.max(0) < math.ceil(at) - 1).view(np.uint8)
        cells[:-1] &= cells[1:]
        cells[:, :-1] &= cells[:, 1:]
        return cells.take(self.rows.first, 0).T.copy().take(self.columns.first, 0)

    def interpolate(
        self, rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "V n"]:
        """Bilinear interpolation of the maps at pixels of the box, in units of PROBABILITY_ONE."""
        maps, y, x = self.maps.values, self.rows, self.columns
        flat, stride = maps.reshape(len(maps), -1), maps.shape[2]
        upper, lower = (y.first * stride).take(rows), (y.second * stride).take(rows)
        weight_y, weight_x = y.share.take(rows), x.share.take(columns)

        # Shapes in annotations would be put together at every call.
        def column(taps: np.ndarray) -> np.ndarray:
            place = taps.take(columns)
            above = flat.take(upper + place, 1).astype(np.float32)
            below = flat.take(lower + place, 1).astype(np.float32)
            return above + (below - above) * weight_y

        first, second = column(x.first), column(x.second)
        return first + (second - first) * weight_x
