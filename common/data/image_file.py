"""Opening of image files with Pillow: which formats, how large, and what counts as unreadable."""

import os
import struct
import zlib
from typing import IO

from PIL import Image

from common.io.errors import UserError

# Of photos and masks. Others stay closed: Pillow starts Ghostscript for an EPS, whatever its name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 1 << 29  # of a photo, 1.5 GiB decoded: the guard against decompression bombs
MAX_SIDE = 1 << 17  # Pillow keeps a pointer for each row
# What Pillow raises on damaged data, depending on the format.
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, RuntimeError),
    *(TypeError, AttributeError, MemoryError, struct.error, zlib.error),
)

Image.MAX_IMAGE_PIXELS = None  # checked here instead


class ImageError(UserError):
    """A photo that cannot be read; the text is the reason, the caller adds the file."""


def open_image(source: IO[bytes] | str | os.PathLike[str]) -> Image.Image:
    """Reads the header of an image file.

    Raises:
      ImageError: no image of `FORMATS`, or one larger than is read.
    """
    try:
        image = Image.open(source, formats=FORMATS)
    except BROKEN as error:
        raise ImageError(f"no readable image ({reason(error)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{width}x{height} pixels, at most {MAX_PIXELS} and sides of {MAX_SIDE} are read"
        )
    return image


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    text = str(error).replace("<_io.BytesIO object at ", "").split("0x")[0]
    return " ".join(text.split())[:200] or type(error).__name__
