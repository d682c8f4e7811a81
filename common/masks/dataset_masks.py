"""The masks of a dataset as pixels or run lengths, in any frame.

A mask's frame is the whole photo, whatever its resolution: the PNG files of OpenImages are of other
sizes than the photos. A pixel of another frame or of a window takes the mask's value at its centre
(nearest sampling), so that nothing is blurred and no threshold is needed. Polygons have no
resolution: they are drawn in the frame that is asked for, by COCO's rule. An object that falls
between all pixels of a frame does not vanish: it gets the pixels that its own pixels lie in.

Shape legend: H, W the frame asked for; h, w a window.
"""

import io
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as coco_mask
from jaxtyping import Bool, Float, Int
from PIL import Image

from common.data import images
from common.data.dataset import Dataset
from common.data.image_file import BROKEN, open_image
from common.io.errors import UserError
from common.io.json_file import parse_json
from common.masks import rle

_MODES = ("1", "L", "P")  # of PNG files: one channel of at most 8 bits; all but 0 is foreground
# Photos and masks of rounded sizes differ by less, other crops and turned photos by more.
_SHAPE_TOLERANCE = 0.1


class MaskError(UserError):
    """A mask that is missing or cannot be read; the text names image, box and file."""


class MaskReader:
    """Reads the masks of boxes, by their rows in `dataset.boxes`. Threads may share it."""

    def __init__(self, dataset: Dataset):
        """Opens the masks.

        Raises:
          UserError: the dataset has none.
        """
        if dataset.mask_offsets is None:
            raise UserError(f"{dataset.directory}: the dataset has no masks")
        self._dataset, self._offsets = dataset, dataset.mask_offsets
        self._root = dataset.meta.get("mask_root") or str(dataset.directory)
        self._offsets = dataset.mask_offsets
        # An empty file cannot be mapped.
        empty = not self._offsets[-1]
        path = dataset.directory / "masks.bin"
        self._data = np.zeros(0, np.uint8)
        if not empty:
            self._data = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def has_mask(self, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which boxes have a mask (be it an empty one)."""
        rows = np.asarray(rows, np.int64)
        return np.asarray(self._offsets[rows + 1]) > np.asarray(self._offsets[rows])

    def entry(self, row: int) -> Any:
        """What is stored of a box: None, {"png": path}, polygons or a run-length dictionary."""
        start, stop = self._offsets[row : row + 2].tolist()
        if stop <= start:
            return None
        return parse_json(self._data[start:stop].tobytes(), f"{self._dataset.directory}/masks.bin")

    def window(
        self, row: int, box: Sequence[float] | Float[np.ndarray, " 4"], size: tuple[int, int]
    ) -> Bool[np.ndarray, "h w"]:
        """A window of the photo, resampled; False outside the photo.

        Args:
          row: of `dataset.boxes`.
          box: the window, normalised xmin, ymin, xmax, ymax; may reach beyond the photo.
          size: height and width of the result.

        Raises:
          MaskError: no mask, an empty one, or one that cannot be read.
        """
        entry = self.entry(row)
        xmin, ymin, xmax, ymax = map(float, box)
        if entry is None:
            raise self._error(row, "no mask")
        if isinstance(entry, list):
            height, width = self._photo_size(row)
            scale = (size[1] / ((xmax - xmin) * width), size[0] / ((ymax - ymin) * height))
            counts = self._draw(row, entry, (xmin * width, ymin * height), scale, size)
            result = rle.decode(counts, size)
            result[~_centres(ymin, ymax, height, size[0])[1]] = False
            result[:, ~_centres(xmin, xmax, width, size[1])[1]] = False
            if result.any() or not (area := _covered(box, (height, width))):
                return result
            shape = (area[3] - area[1], area[2] - area[0])
            drawn = rle.decode(self._draw(row, entry, area[:2], (1.0, 1.0), shape), shape)
            return _lying_in(drawn, area[:2], (height, width), box, size)
        frame = (
            self._open_png(row, entry["png"])
            if "png" in entry
            else rle.decode(*self._run_lengths(row, entry))
        )
        height, width = frame.shape if isinstance(frame, np.ndarray) else frame.size[::-1]
        y, inside_y = _centres(ymin, ymax, height, size[0])
        x, inside_x = _centres(xmin, xmax, width, size[1])
        result = np.zeros(size, bool)
        if inside_x.any() and inside_y.any():
            y, x = y[inside_y], x[inside_x]
            area = (x[0], y[0], x[-1] + 1, y[-1] + 1)
            result[np.ix_(inside_y, inside_x)] = _cut(frame, area)[np.ix_(y - area[1], x - area[0])]
        if result.any() or not (area := _covered(box, (height, width))):
            return result
        return _lying_in(_cut(frame, area), area[:2], (height, width), box, size)

    def rle(self, row: int, size: tuple[int, int]) -> bytes | None:
        """Compressed counts in a frame of this height and width.

        Returns:
          None where the box has no mask, or one without a pixel in its own frame (for polygons, in
          the photo). Sampled are the centres of the pixels.

        Raises:
          MaskError: the mask cannot be read.
        """
        entry = self.entry(row)
        if entry is None:
            return None
        if isinstance(entry, list):
            height, width = self._photo_size(row)
            scale = (size[1] / width, size[0] / height)
            counts = self._draw(row, entry, (0.0, 0.0), scale, size)
            return counts if rle.areas([counts])[0] else self._between_pixels(row, size)
        if "png" not in entry:
            counts, own_size = self._run_lengths(row, entry)
            if not rle.areas([counts])[0]:
                return None
            resized = rle.resize([counts], own_size, size)[0]
            return resized if rle.areas([resized])[0] else self._between_pixels(row, size)
        image = self._open_png(row, entry["png"])
        area = image.getbbox()
        if area is None:
            return None
        x0, y0, x1, y1 = area
        y, x = rle.nearest(image.height, size[0]), rle.nearest(image.width, size[1])
        top, bottom = np.searchsorted(y, [y0, y1]).tolist()
        left, right = np.searchsorted(x, [x0, x1]).tolist()
        pixels = _cut(image, area)[np.ix_(y[top:bottom] - y0, x[left:right] - x0)]
        if not pixels.any():
            return self._between_pixels(row, size)
        return rle.encode_window(pixels, top, left, size)

    def _between_pixels(self, row: int, size: tuple[int, int]) -> bytes | None:
        """Counts of a mask that no pixel of a frame samples; None where it is empty."""
        pixels = self.window(row, (0.0, 0.0, 1.0, 1.0), size)
        return rle.encode([pixels])[0] if pixels.any() else None

    def is_empty(self, row: int) -> bool:
        """Whether a box has no mask, or one without a pixel in its own frame.

        Raises:
          MaskError: the mask cannot be read.
        """
        entry = self.entry(row)
        if isinstance(entry, dict) and "png" in entry:
            return self._open_png(row, entry["png"]).getbbox() is None
        if isinstance(entry, list):
            return self.rle(row, self._photo_size(row)) is None
        return entry is None or not rle.areas([self._run_lengths(row, entry)[0]])[0]

    def _open_png(self, row: int, path: str) -> Image.Image:
        """The decoded file, checked."""
        path = os.path.join(self._root, path)
        try:
            data = images.read_file(path)
            image = open_image(io.BytesIO(data))
            mode = image.mode
            if mode in _MODES:
                image.load()
        except images.ImageError as error:
            raise self._error(row, f"{path}: {error}") from error
        except BROKEN as error:
            raise self._error(row, f"{path}: no readable mask file") from error
        if mode not in _MODES:
            bits = " (16 bits)" if mode.startswith("I") else ""
            raise self._error(
                row, f"{path}: mask of mode {mode}{bits}, expected one channel of 1 or 8 bits"
            )
        self._check_shape(row, f"{path}: ", image.size[::-1])
        self._check_place(row, path, image)
        return image

    def _check_place(self, row: int, path: str, image: Image.Image) -> None:
        """Refuses a mask that lies mostly outside its box, as one of swapped colours does."""
        area = image.getbbox()
        if area is None:
            return
        xmin, ymin, xmax, ymax = self._dataset.boxes[row].tolist()
        width, height = image.size
        box = (
            max(math.floor(xmin * width) - 1, 0),
            max(math.floor(ymin * height) - 1, 0),
            min(math.ceil(xmax * width) + 1, width),
            min(math.ceil(ymax * height) + 1, height),
        )
        if area[0] >= box[0] and area[1] >= box[1] and area[2] <= box[2] and area[3] <= box[3]:
            return
        inside, total = (sum(part.histogram()[1:]) for part in (image.crop(box), image))
        if 2 * inside < total:
            raise self._error(
                row,
                f"{path}: {1 - inside / total:.0%} of the mask lies outside its box, expected it "
                "inside (is it inverted, or of another box?)",
            )

    def _run_lengths(self, row: int, entry: Any) -> tuple[bytes, tuple[int, int]]:
        """Checked compressed counts and their height and width."""
        try:
            height, width = (int(side) for side in entry["size"])
            counts = entry["counts"]
            counts = counts.encode("ascii") if isinstance(counts, str) else rle.encode_runs(counts)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._error(
                row, f"mask {json.dumps(entry)[:80]}, expected polygons or size and counts"
            ) from error
        if (broken := rle.find_broken([counts], np.array([[height, width]]))) is not None:
            raise self._error(row, broken[1])
        self._check_shape(row, "", (height, width))
        return counts, (height, width)

    def _draw(
        self,
        row: int,
        polygons: list[Any],
        origin: tuple[float, float],
        scale: tuple[float, float],
        size: tuple[int, int],
    ) -> bytes:
        """Counts of polygons after moving `origin` to the corner and scaling x and y."""
        try:
            points = [np.asarray(p, np.float64).reshape(-1, 2) for p in polygons]
            if (
                not points
                or min(map(len, points)) < 3
                or not all(np.isfinite(p).all() for p in points)
            ):
                raise ValueError("no polygon")
        except (TypeError, ValueError) as error:
            raise self._error(
                row,
                f"mask {json.dumps(polygons)[:80]}, expected polygons [x, y, ...] of three or "
                "more points",
            ) from error
        # What is far outside is cut there: drawing takes the memory of the outline's length.
        low = np.array(origin) - (np.array(size[::-1]) + 1) / scale
        high = np.array(origin) + 2 * (np.array(size[::-1]) + 1) / scale
        points = [np.clip(p, low, high) for p in points]
        moved = [((p - origin) * scale).reshape(-1).tolist() for p in points]
        counts = coco_mask.segmToRle(moved, size[1], size[0])["counts"]
        return counts.encode() if isinstance(counts, str) else counts

    def _photo_size(self, row: int) -> tuple[int, int]:
        height, width = self._dataset.image_sizes[self._image(row)].tolist()
        if not (height and width):
            raise self._error(
                row,
                "polygons are in pixels of a photo of unknown size: prepare the data with --images",
            )
        return height, width

    def _check_shape(self, row: int, where: str, size: tuple[int, int]) -> None:
        height, width = self._dataset.image_sizes[self._image(row)].tolist()
        if not (height and width):
            return
        if not same_shape(size, (height, width)):
            raise self._error(
                row,
                f"{where}mask of {size[0]}x{size[1]} (height x width), expected the shape of the "
                f"photo, {height}x{width}, at any resolution",
            )

    def _image(self, row: int) -> int:
        return int(np.searchsorted(self._dataset.box_offsets, row, "right")) - 1

    def _error(self, row: int, reason: str) -> MaskError:
        dataset, image = self._dataset, self._image(row)
        number = row - int(dataset.box_offsets[image])
        label = dataset.class_labels[dataset.box_classes[row]]
        return MaskError(
            f"{dataset.directory}: image {dataset.image_id(image)!r}, box {number} ({label}): "
            f"{reason}"
        )


def _covered(
    box: Sequence[float] | Float[np.ndarray, " 4"], frame: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Pixels of a frame of (height, width) in a window, xmin, ymin, xmax, ymax; None without."""
    (xmin, ymin, xmax, ymax), (height, width) = map(float, box), frame
    x0, y0 = max(math.floor(xmin * width), 0), max(math.floor(ymin * height), 0)
    x1, y1 = min(math.ceil(xmax * width), width), min(math.ceil(ymax * height), height)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _lying_in(
    part: Bool[np.ndarray, "p q"],
    corner: tuple[int, int],
    frame: tuple[int, int],
    box: Sequence[float] | Float[np.ndarray, " 4"],
    size: tuple[int, int],
) -> Bool[np.ndarray, "h w"]:
    """The pixels of a window in which centres of foreground pixels of a frame lie.

    Args:
      part: of the frame.
      corner: x and y of its first pixel.
      frame: height and width.
      box: the window in it, normalised xmin, ymin, xmax, ymax.
      size: height and width of the result.
    """
    xmin, ymin, xmax, ymax = map(float, box)
    rows, columns = np.nonzero(part)
    y = ((rows + corner[1] + 0.5) / frame[0] - ymin) / (ymax - ymin) * size[0]
    x = ((columns + corner[0] + 0.5) / frame[1] - xmin) / (xmax - xmin) * size[1]
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    result = np.zeros(size, bool)
    result[y[inside].astype(int), x[inside].astype(int)] = True
    return result


def same_shape(size: Sequence[int], photo: Sequence[int]) -> bool:
    """Whether a frame can be that of a whole photo (both height, width), at any resolution."""
    return abs(math.log(size[0] * photo[1] / (size[1] * photo[0]))) <= _SHAPE_TOLERANCE


def _cut(frame: Bool[np.ndarray, "H W"] | Image.Image, area: tuple[int, ...]) -> np.ndarray:
    """Foreground of a part xmin, ymin, xmax, ymax."""
    x0, y0, x1, y1 = (int(side) for side in area)
    if isinstance(frame, np.ndarray):
        return frame[y0:y1, x0:x1]
    return np.asarray(frame.crop((x0, y0, x1, y1))) != 0


def _centres(
    low: float, high: float, length: int, number: int
) -> tuple[Int[np.ndarray, " number"], Bool[np.ndarray, " number"]]:
    """Pixel below the centre of each of `number` pixels of a window, and which are in the frame."""
    share = low + (np.arange(number) + 0.5) * ((high - low) / number)
    # A centre on the border of two pixels is in the later one, as in `rle.nearest`.
    place = np.floor(share * length + 1e-6).astype(np.int64)
    return place, (place >= 0) & (place < length)
