"""From the canvas of a crop to the pixels of the photo.

A pixel of the photo belongs to a box when its centre lies inside. It takes the value that the
bilinear interpolation of the crop has there; the crop's content covers the box exactly.

Shapes: h w content of a crop, H W pixels of the photo that belong to the box.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped


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


def paste(
    content: Shaped[np.ndarray, "*V h w"],
    window: Float[np.ndarray, " 4"],
    pixels: Int[np.ndarray, " 4"],
) -> Float[np.ndarray, "*V H W"]:
    """Values of a crop at the pixels of the photo, float32.

    Args:
      content: of the crop, without the padding of its canvas; several maps at once are fine.
      window: box that the content shows, xmin, ymin, xmax, ymax in pixels of the photo.
      pixels: of the photo, from `pixel_window`.
    """
    xmin, ymin, xmax, ymax = (float(value) for value in window)
    top, left, bottom, right = (int(value) for value in pixels)
    first, second, share = _taps(top, bottom, ymin, ymax, content.shape[-2])
    rows = _mix(content, first, second, share[:, None], axis=-2)
    first, second, share = _taps(left, right, xmin, xmax, content.shape[-1])
    return _mix(rows, first, second, share, axis=-1)


def _taps(start, stop, low, high, cells):
    """The two cells around each pixel centre and the weight of the second."""
    centres = (np.arange(start, stop) + 0.5 - low) * (cells / max(high - low, 1e-9)) - 0.5
    centres = np.clip(centres, 0, cells - 1)
    first = centres.astype(np.int64)
    return first, np.minimum(first + 1, cells - 1), (centres - first).astype(np.float32)


def _mix(values, first, second, share, axis):
    low = np.take(values, first, axis).astype(np.float32, copy=False)
    high = np.take(values, second, axis).astype(np.float32, copy=False)
    return low + (high - low) * share
