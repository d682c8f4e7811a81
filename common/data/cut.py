"""A part of a photo by an affine map: what a turned, resized, cropped, mirrored view of it shows.

Shape legend: h, w content of the cut; a, b the area around it. Sizes are (height, width), areas
xmin, ymin, xmax, ymax, points x, y; pixel i covers [i, i + 1).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from common.data import images

MEAN_PIXEL = (124, 116, 104)  # where a turned view reaches beyond the photo
_MUCH = 1.3  # enlargement; a turned pixel costs 2.5 times a resized one
_NEIGHBOURS = 1  # pixels around an area that bilinear reading may look at

# a, b, c, d, e, f: x, y becomes a x + b y + c, d x + e y + f.
Affine = tuple[float, float, float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Cut:
    """One view, ready to be read: the upright area around it, and the way from there.

    Where the photo is shrunk, the area is resized first, with antialiasing, and then turned; where
    it is enlarged, the pixels of the photo themselves are turned, which resamples only once, but
    where they are enlarged by so much that it is cheaper to turn the few and then to resize.

    Attributes:
      area: normalised, inside the photo.
      area_size: height, width of the area when resized.
      content: height, width of the cut.
      turned_size: height, width of the cut when turned: `content`, or smaller.
      affine: from x, y of that to x, y of the resized area; None when it is upright.
      beyond: whether the cut reaches beyond the photo.
      flip: mirror the cut.
    """

    area: tuple[float, float, float, float]
    area_size: tuple[int, int]
    content: tuple[int, int]
    turned_size: tuple[int, int]
    affine: Affine | None
    beyond: bool
    flip: bool

    @classmethod
    def upright(
        cls, area: tuple[float, float, float, float], content: tuple[int, int], flip: bool
    ) -> "Cut":
        """All of an area that lies inside the photo."""
        return cls(area, content, content, content, None, False, flip)

    @classmethod
    def turned(
        cls,
        to_photo: Affine,
        content: tuple[int, int],
        photo_size: tuple[int, int],
        flip: bool,
        *,
        enlarge_first: bool = False,
    ) -> "Cut":
        """What a map shows.

        Args:
          to_photo: from pixels of the cut, before it is mirrored, to those of the photo.
          content: height, width of the cut.
          photo_size: height, width.
          flip: mirror the cut.
          enlarge_first: the area gets the resolution of the cut also where that enlarges it: right
            for what has no pixels of its own, such as polygons.
        """
        size = content if enlarge_first else _turned_size(to_photo, content)
        a, b, c, d, e, f = _scaled(to_photo, content, size)
        height, width = size
        x, y = (a * width + b * height) / 2 + c, (d * width + e * height) / 2 + f
        half_x = (abs(a) * width + abs(b) * height) / 2
        half_y = (abs(d) * width + abs(e) * height) / 2
        photo_height, photo_width = photo_size
        x0, x1 = _inside(x - half_x, x + half_x, photo_width)
        y0, y1 = _inside(y - half_y, y + half_y, photo_height)
        reach = max(2 * half_x - (x1 - x0), 2 * half_y - (y1 - y0))
        scale_x, scale_y = 1 / math.hypot(a, b), 1 / math.hypot(d, e)
        if not enlarge_first:
            scale_x, scale_y = min(scale_x, 1.0), min(scale_y, 1.0)
        if scale_x == scale_y == 1.0:  # of whole pixels, which need no resizing
            x0, x1 = _whole_pixels(x0, x1, photo_width)
            y0, y1 = _whole_pixels(y0, y1, photo_height)
        area = (x0 / photo_width, y0 / photo_height, x1 / photo_width, y1 / photo_height)
        area_size = (max(round((y1 - y0) * scale_y), 1), max(round((x1 - x0) * scale_x), 1))
        scale_x, scale_y = area_size[1] / (x1 - x0), area_size[0] / (y1 - y0)
        affine = (
            *(a * scale_x, b * scale_x, (c - x0) * scale_x),
            *(d * scale_y, e * scale_y, (f - y0) * scale_y),
        )
        return cls(area, area_size, content, size, affine, reach > 1e-6, flip)

    @property
    def photo_size(self) -> tuple[float, float]:
        """Height, width at which the whole photo would be drawn: what decoding must provide."""
        x0, y0, x1, y1 = self.area
        return self.area_size[0] / (y1 - y0), self.area_size[1] / (x1 - x0)

    def image(self, pixels: images.Pixels) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of the cut; the mean pixel outside the photo."""
        image = images.resample(pixels, self.area, self.area_size)
        return np.asarray(self._turn(image, Image.Resampling.BILINEAR, MEAN_PIXEL))

    def mask(self, area: Bool[np.ndarray, "a b"]) -> UInt8[np.ndarray, "h w"]:
        """The mask of the cut, 1 for foreground, from that of the area at `area_size`."""
        grey = Image.fromarray(np.ascontiguousarray(area, np.uint8))
        return np.asarray(self._turn(grey, Image.Resampling.NEAREST, 0))

    def inside(self) -> Bool[np.ndarray, "h w"]:
        """Which pixels of the cut lie in the photo."""
        if not self.beyond:
            return np.ones(self.content, bool)
        return self.mask(np.ones(self.area_size, bool)) > 0

    def _turn(self, image: Image.Image, method: Image.Resampling, fill: Any) -> Image.Image:
        if self.affine is not None:
            size = self.turned_size[::-1]
            image = image.transform(
                size, Image.Transform.AFFINE, self.affine, method, fillcolor=fill
            )
            if self.turned_size != self.content:
                image = image.resize(self.content[::-1], method)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def _turned_size(to_photo: Affine, content: tuple[int, int]) -> tuple[int, int]:
    """Height, width at which a cut is turned: that of the photo's pixels if they are much fewer."""
    a, b, _, d, e, _ = to_photo
    step_x, step_y = math.hypot(a, d), math.hypot(b, e)  # photo pixels for a pixel of the cut
    if max(step_x, step_y) > 1 / _MUCH:
        return content
    height, width = content
    return max(math.ceil(height * step_y), 1), max(math.ceil(width * step_x), 1)


def _scaled(to_photo: Affine, content: tuple[int, int], size: tuple[int, int]) -> Affine:
    """The map from pixels of the cut when drawn at another size."""
    a, b, c, d, e, f = to_photo
    x, y = content[1] / size[1], content[0] / size[0]
    return a * x, b * y, c, d * x, e * y, f


def _inside(low: float, high: float, limit: int) -> tuple[float, float]:
    """The part of a span inside the photo; its nearest pixel where it lies outside."""
    low, high = max(low, 0.0), min(high, float(limit))
    if high > low:
        return low, high
    low = min(max(low, 0.0), limit - 1.0)
    return low, low + 1.0


def _whole_pixels(low: float, high: float, limit: int) -> tuple[float, float]:
    first = max(math.floor(low) - _NEIGHBOURS, 0)
    return float(first), float(min(math.ceil(high) + _NEIGHBOURS, limit))
