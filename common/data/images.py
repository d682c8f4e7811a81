"""Photos of any make to uint8 RGB, whole or in part, at any size.

Decoding and resizing are Pillow's: it releases the interpreter lock, reads everything that photo
collections hold (greyscale, CMYK, palette, 16 bits, EXIF rotation), tells truncated files from
whole ones, and resizes with antialiasing in less than half the CPU time of tf.image (about that of
tf.image without antialiasing; `python -m scripts.bench.bench_input --part=decoders`). A JPEG at
least twice too large is decoded at 1/2, 1/4 or 1/8 of its size (DCT scaling). Only parts of JPEG
files are decoded by TensorFlow: Pillow has no way to do so. Where TensorFlow is not installed,
Pillow decodes all of the file and the part is cut out: the same pixels, for more time.

Sizes are (height, width), windows and areas xmin, ymin, xmax, ymax.
"""

import dataclasses
import io
import math
import os
import stat
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from common.data import tensorflow_io
from common.data.image_file import BROKEN, ImageError, open_image, reason

_WORTH_PART = 0.6  # share of a photo above which all of it is decoded
_ROUNDING = 1e-6  # pixels by which a window may miss whole ones and need no resampling
_PART_MARGIN = 16  # pixels around a part; the outermost ones lack their neighbours' colour


# EXIF orientation -> Pillow operation from stored to displayed, and the way back of a point:
# displayed (x, y) in [0, 1] -> stored: swap the axes?, then mirror the first?, the second?
_ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, False, True),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, True, False),
}


@dataclasses.dataclass(frozen=True)
class Photo:
    """An opened, not yet decoded photo.

    Attributes:
      image: Pillow's handle.
      orientation: EXIF orientation to apply, 1: none.
      size: height, width as displayed, i.e. after `orientation`.
      data: content of the file.
    """

    image: Image.Image
    orientation: int
    size: tuple[int, int]
    data: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A decoded photo or part of one, possibly at 1/2, 1/4 or 1/8 of its size.

    Attributes:
      image: RGB, in the axes of the file.
      orientation: EXIF orientation still to apply, 1: none.
      extent: width, height of the whole photo in pixels of `image`.
      origin: x, y of the first pixel of `image` in the whole photo.
    """

    image: Image.Image
    orientation: int
    extent: tuple[float, float]
    origin: tuple[int, int] = (0, 0)


def canvas_shape(canvas: tuple[int, int], pad_multiple: int) -> tuple[int, int]:
    """Height, width of the canvas padded up to a multiple: 800x1333 by 32 is 800x1344."""
    height, width = (-(-side // pad_multiple) * pad_multiple for side in canvas)
    return height, width


def read_file(path: str) -> bytes:
    """Content of a local file or of one behind an address such as gs://bucket/name.

    Raises:
      ImageError: it cannot be read.
    """
    try:
        if "://" not in path:
            # A pipe would be waited for.
            with open(
                path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)
            ) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ImageError("not a regular file")
                return file.read()
        return tensorflow_io.read_address(path)
    except OSError as error:
        raise ImageError(error.strerror or reason(error)) from error


def open_photo(data: bytes, annotated_size: tuple[int, int] = (0, 0)) -> Photo:
    """Reads the header of an encoded photo.

    EXIF orientation is applied, as every viewer and annotation tool does, so that normalised boxes
    refer to the photo as displayed. Only when the annotations give an image size, and its shape is
    that of the *stored* pixels (COCO's JSON does so), is the photo left as stored.

    Args:
      data: content of the file.
      annotated_size: height, width that the boxes refer to, (0, 0) when unknown.

    Raises:
      ImageError: not a photo, or too large.
    """
    if not data:
        raise ImageError("empty file")
    image = open_image(io.BytesIO(data))
    width, height = image.size
    orientation = _orientation(image)
    if orientation == 1:
        return Photo(image, 1, (height, width), data)
    _, swap, _, _ = _ORIENTATIONS[orientation]
    if swap and is_as_stored((height, width), annotated_size):
        return Photo(image, 1, (height, width), data)
    return Photo(image, orientation, (width, height) if swap else (height, width), data)


def is_as_stored(stored: tuple[int, int], annotated: tuple[int, int]) -> bool:
    """Whether annotations are of the stored pixels of a photo that is shown turned a quarter.

    Both are heights and widths; (0, 0) is an annotated size that is unknown.
    """
    if not all(annotated):
        return False
    shape, other = (math.log(size[0] / size[1]) for size in (stored, annotated))
    return abs(other - shape) < abs(other + shape)


def photo_of_pixels(image: Image.Image) -> Photo:
    """An image in memory as a photo, as its pixels lie; `image` itself stays as it is.

    Raises:
      ImageError: its pixels cannot be read as colours.
    """
    try:
        pixels = _to_rgb(image.copy())  # decoding at a reduced size changes the handle of a file
    except BROKEN as error:
        raise ImageError(reason(error)) from error
    return Photo(pixels, 1, (pixels.height, pixels.width), b"")


def decode(
    photo: Photo,
    full: tuple[float, float],
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Pixels:
    """Decodes a photo, of which nothing larger than height, width `full` will be drawn.

    Args:
      photo: opened photo.
      full: size of the whole photo, even if only a part is drawn.
      area: xmin, ymin, xmax, ymax, normalised, of all that will be drawn. Of a sequential JPEG, as
        cameras write them, no more than this is transformed, and nothing below is read.

    Raises:
      ImageError: the data are damaged or end early.
    """
    image = photo.image
    spans = _stored_spans(area, photo.orientation)
    swap = photo.orientation in _ORIENTATIONS and _ORIENTATIONS[photo.orientation][1]
    wide, high = full if swap else full[::-1]
    wanted = (math.ceil(wide), math.ceil(high))
    try:
        part = _decode_part(photo, wanted, spans)
        if part is not None:
            return part
        reduced = image.draft(None, wanted)
        # Reduced sizes are rounded up: the photo ends inside the last row and column.
        extent = reduced[1][2:] if reduced else image.size
        return Pixels(_to_rgb(image), photo.orientation, (extent[0], extent[1]))
    except BROKEN as error:
        raise ImageError(reason(error)) from error


def _decode_part(
    photo: Photo, wanted: tuple[int, int], spans: list[tuple[float, float]]
) -> Pixels | None:
    """The part of a JPEG between the given shares of its stored width and height, if that is worth
    it, with what antialiasing needs around it."""
    image = photo.image
    share = math.prod(end - start for start, end in spans)
    sequential = image.format == "JPEG" and "progressive" not in image.info
    if share > _WORTH_PART or not sequential or image.mode not in ("RGB", "L"):
        return None
    sizes = zip(image.size, wanted, strict=True)
    reduction = min(max(1, side // max(least, 1)) for side, least in sizes)
    reduction = next(r for r in (8, 4, 2, 1) if r <= reduction)
    extent = image.size[0] / reduction, image.size[1] / reduction
    window = []
    for (start, end), side, least in zip(spans, extent, wanted, strict=True):
        margin = _PART_MARGIN + math.ceil(2 * side / least)
        first = max(math.floor(start * side) - margin, 0)
        window.append((first, min(math.ceil(end * side) + margin, math.ceil(side)) - first))
    (left, width), (top, height) = window
    part = _cut_jpeg(photo, reduction, (left, top, left + width, top + height))
    return None if part is None else Pixels(part, photo.orientation, extent, (left, top))


def _cut_jpeg(
    photo: Photo, reduction: int, window: tuple[int, int, int, int]
) -> Image.Image | None:
    """The window (left, top, right, bottom) of a JPEG at 1 / reduction of its size, RGB; None where
    decoding all of it will tell what is wrong, or read it in spite of that."""
    if not tensorflow_io.installed():
        width, height = photo.image.size
        photo.image.draft(None, (width // reduction, height // reduction))
        return _to_rgb(photo.image).crop(window)
    pixels = tensorflow_io.cut_jpeg(photo.data, reduction, window)
    return None if pixels is None else Image.fromarray(pixels)


def _stored_spans(
    window: tuple[float, float, float, float], orientation: int
) -> list[tuple[float, float]]:
    """A normalised window of the displayed photo as shares of the stored width and height."""
    _, swap, *mirrors = _ORIENTATIONS.get(orientation, (None, False, False, False))
    spans = [window[0::2], window[1::2]]
    spans = spans[::-1] if swap else spans
    return [
        (1 - end, 1 - start) if mirror else (start, end)
        for (start, end), mirror in zip(spans, mirrors, strict=True)
    ]


def resample(
    pixels: Pixels, window: tuple[float, float, float, float], size: tuple[int, int]
) -> Image.Image:
    """A part of a photo at another size: bilinear, antialiased (the filter grows with the
    reduction). Threads may share `pixels`.

    Args:
      pixels: decoded photo.
      window: xmin, ymin, xmax, ymax, normalised, inside the photo as displayed.
      size: height, width of the result.
    """
    operation, swap, *_ = _ORIENTATIONS.get(pixels.orientation, (None, False))
    height, width = size[::-1] if swap else size
    image = pixels.image
    (x0, x1), (y0, y1) = (
        (max(start * side - first, 0.0), min(end * side - first, limit))
        for (start, end), side, first, limit in zip(
            _stored_spans(window, pixels.orientation),
            pixels.extent,
            pixels.origin,
            image.size,
            strict=True,
        )
    )
    left, top = round(x0), round(y0)
    right, bottom = left + width, top + height
    if max(abs(x0 - left), abs(y0 - top), abs(x1 - right), abs(y1 - bottom)) < _ROUNDING:
        if image.size != (width, height):
            image = image.crop((left, top, right, bottom))
    else:
        image = image.resize(
            (width, height), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1), reducing_gap=3.0
        )
    return image if operation is None else image.transpose(operation)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale (a mode "I" file holds the same in 32 bits)
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            values = values >> 8
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except BROKEN:
        return 1  # a damaged EXIF block says nothing, the pixels may be whole
    return orientation if orientation in _ORIENTATIONS else 1
