"""Where the crop of a box lies in its photo, and its pixels.

A box is jittered, turned, resized, mirrored, and put at the top left of a canvas.

Everything about sizes is vectorised over boxes and depends on the shape of the photo only, so that
a plan knows the canvas of a batch before any photo is opened.

Shape legend: n boxes, c canvases, H, W a canvas, h, w content of a crop. Sizes are (height, width),
boxes and windows xmin, ymin, xmax, ymax, points x, y.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from common.data import images
from common.io.settings import check

NUM_DRAWS = 8  # random numbers of a crop
# Of photos whose size the dataset does not know, until they are opened: most are like this.
ASSUMED_SIZE = (768, 1024)
_MEAN_PIXEL = (124, 116, 104)  # where a turned crop reaches beyond the photo
_MAX_DEVIATIONS = 3.0
# Standard deviation of the angle of a class by the median aspect of its boxes.
_ASPECTS, _DEGREES = (2.0, 6.0), (5.0, 30.0)


@dataclasses.dataclass(frozen=True)
class CropSize:
    """How large boxes are drawn: `config.data.crop`.

    Attributes:
      short: short side in pixels, or the range that it is drawn from; None with `fixed`.
      long: longer crops are shrunk to it; None with `fixed`.
      fixed: height, width of all crops, whatever the aspect of the box, or None.
    """

    short: float | tuple[float, float] | None
    long: float | None
    fixed: tuple[int, int] | None

    def __post_init__(self):
        one = bool(self.short) != bool(self.fixed)
        check(one, "short", self.short, f"a size in pixels, or None beside fixed {self.fixed}")
        if self.fixed is not None:
            check(min(self.fixed) >= 1, "fixed", self.fixed, "height, width in pixels")
            return
        low, high = self.range
        check(1 <= low <= high, "short", self.short, "1 <= min <= max, in pixels")
        check((self.long or 0) >= high, "long", self.long, f"at least short, {high:g}")

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest short side."""
        if isinstance(self.short, tuple):
            return self.short
        return self.short or 0.0, self.short or 0.0

    @property
    def middle(self) -> "CropSize":
        """The same without a range: what evaluation cuts."""
        if self.fixed is not None:
            return self
        return dataclasses.replace(self, short=sum(self.range) / 2)

    def content(
        self, sides: Float[np.ndarray, "n 2"], draws: Float[np.ndarray, " n"]
    ) -> Int[np.ndarray, "n 2"]:
        """Height, width of crops of windows of height, width `sides`; `draws` in [0, 1)."""
        if self.fixed is not None:
            return np.broadcast_to(np.array(self.fixed), sides.shape)
        low, high = self.range
        scale = (low + (high - low) * draws) / sides.min(axis=1)
        scale = np.minimum(scale, (self.long or np.inf) / sides.max(axis=1))
        return np.maximum(np.floor(sides * scale[:, None] + 0.5), 1).astype(np.int64)


def choose_canvas(
    content: Int[np.ndarray, "n 2"], canvases: Int[np.ndarray, "c 2"]
) -> Int[np.ndarray, " n"]:
    """The smallest canvas that holds each content; where none does, that which shrinks it least."""
    ratio = np.minimum((canvases / content[:, None]).min(axis=2), 1.0)
    area = canvases.prod(axis=1)
    return np.lexsort((np.broadcast_to(area, ratio.shape), -ratio), axis=1)[:, 0]


def shrink(
    content: Int[np.ndarray, "n 2"], canvas: tuple[int, int] | Int[np.ndarray, "n 2"]
) -> Int[np.ndarray, "n 2"]:
    """Content that fits into a canvas (one for all, or one each), with the same aspect."""
    canvas = np.asarray(canvas)
    ratio = np.minimum((canvas / content).min(axis=1, keepdims=True), 1.0)
    return np.clip(np.floor(content * ratio + 0.5).astype(np.int64), 1, canvas)


def rotation_deviations(aspects: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Standard deviations of the angles, in radians, for median aspects (long over short side).

    "Larger rotated variance for classes with severely unbalanced aspect ratio": 5 degrees up to
    2, 30 degrees from 6 on, linear between.
    """
    return np.radians(np.interp(aspects, _ASPECTS, _DEGREES))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where crops lie in their photos. All lengths are in pixels of the photo but for `content`.

    Attributes:
      centre: x, y.
      sides: height, width.
      angle: radians by which the window is turned from x towards y.
      flip: whether the content is mirrored left to right.
      content: height, width of the crop in its own pixels.
    """

    centre: Float[np.ndarray, "n 2"]
    sides: Float[np.ndarray, "n 2"]
    angle: Float[np.ndarray, " n"]
    flip: Bool[np.ndarray, " n"]
    content: Int[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.angle)

    def on_canvas(self, canvas: tuple[int, int] | Int[np.ndarray, "n 2"]) -> "Windows":
        """The same windows, drawn smaller where they do not fit (`shrink`)."""
        return dataclasses.replace(self, content=shrink(self.content, canvas))


def clip_boxes(
    boxes: Float[np.ndarray, "n 4"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n 4"]:
    """Normalised boxes to pixels of photos of height, width `sizes`, clipped to them."""
    scale = np.asarray(sizes, np.float64)[:, [1, 0, 1, 0]]
    return np.clip(np.asarray(boxes, np.float64), 0.0, 1.0) * scale


def windows_of(pixel_boxes: Float[np.ndarray, "n 4"], size: CropSize) -> Windows:
    """Windows that show boxes (of positive area, in pixels) as they are."""
    count = len(pixel_boxes)
    corners = pixel_boxes.reshape(-1, 2, 2)
    sides = (corners[:, 1] - corners[:, 0])[:, ::-1]
    return Windows(
        centre=corners.mean(axis=1),
        sides=sides,
        angle=np.zeros(count),
        flip=np.zeros(count, bool),
        content=size.middle.content(sides, np.zeros(count)),
    )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training crops vary.

    Attributes:
      size: of the crops.
      jitter: each side of a box moves by up to this share of the box's length, in or out.
      flip: mirror half of the crops.
    """

    size: CropSize
    jitter: float
    flip: bool

    def windows(
        self,
        boxes: Float[np.ndarray, "n 4"],
        photo_sizes: Int[np.ndarray, "n 2"],
        jittered: Bool[np.ndarray, " n"],
        deviations: Float[np.ndarray, " n"],
        draws: Float[np.ndarray, "n 8"],
    ) -> Windows:
        """Random windows around boxes.

        A window is turned about the box's centre and takes the extent that an ellipse in the box
        has along its turned axes: what a box drawn around the turned object would about be.

        Args:
          boxes: normalised, with an area inside the photo.
          photo_sizes: in pixels.
          jittered: which boxes to move.
          deviations: standard deviations of the angles, radians; 0 does not turn.
          draws: random numbers in [0, 1).
        """
        pixels = clip_boxes(boxes, photo_sizes)
        length = (pixels[:, 2:] - pixels[:, :2])[:, [0, 1, 0, 1]]
        move = (2 * draws[:, :4] - 1) * self.jitter * jittered[:, None]
        limits = np.asarray(photo_sizes, np.float64)[:, [1, 0, 1, 0]]
        pixels = np.clip(pixels + move * length, 0.0, limits)
        corners = pixels.reshape(-1, 2, 2)
        # Box and Muller's way from uniform to normal numbers.
        normal = np.sqrt(-2 * np.log1p(-draws[:, 4])) * np.cos(2 * np.pi * draws[:, 5])
        angle = np.clip(normal, -_MAX_DEVIATIONS, _MAX_DEVIATIONS) * deviations
        width, height = (corners[:, 1] - corners[:, 0]).T
        cos, sin = np.cos(angle), np.sin(angle)
        sides = np.stack(
            [np.hypot(width * sin, height * cos), np.hypot(width * cos, height * sin)], axis=1
        )
        return Windows(
            centre=corners.mean(axis=1),
            sides=sides,
            angle=angle,
            flip=self.flip & (draws[:, 7] < 0.5),
            content=self.size.content(sides, draws[:, 6]),
        )


@dataclasses.dataclass(frozen=True)
class Cut:
    """One window, ready to be read: the upright area around it, and the way from there.

    The area is brought to `area_size` first, where antialiasing is cheap, then turned.

    Attributes:
      area: normalised, inside the photo.
      area_size: height, width of the area when resized.
      content: height, width of the crop.
      affine: from x, y of the crop to x, y of the resized area; None when it is upright.
      beyond: whether the crop reaches beyond the photo.
      flip: mirror the crop.
    """

    area: tuple[float, float, float, float]
    area_size: tuple[int, int]
    content: tuple[int, int]
    affine: tuple[float, ...] | None
    beyond: bool
    flip: bool

    @classmethod
    def of(
        cls, windows: Windows, row: int, photo_size: tuple[int, int], max_scale: float = math.inf
    ) -> "Cut":
        """The cut of one of the windows; a turned one is not enlarged by more than `max_scale`
        before it is turned."""
        x, y = windows.centre[row].tolist()
        height, width = windows.sides[row].tolist()
        content = tuple(windows.content[row].tolist())
        angle, flip = float(windows.angle[row]), bool(windows.flip[row])
        cos, sin = math.cos(angle), math.sin(angle)
        half_x = (width * abs(cos) + height * abs(sin)) / 2
        half_y = (width * abs(sin) + height * abs(cos)) / 2
        photo_height, photo_width = photo_size
        x0, x1 = max(x - half_x, 0.0), min(x + half_x, float(photo_width))
        y0, y1 = max(y - half_y, 0.0), min(y + half_y, float(photo_height))
        area = (x0 / photo_width, y0 / photo_height, x1 / photo_width, y1 / photo_height)
        if not angle:
            return cls(area, content, content, None, False, flip)
        # Photo pixels for a pixel of the crop, along its own axes, then along the photo's.
        step_x, step_y = width / content[1], height / content[0]
        scale_x = min(1 / math.hypot(step_x * cos, step_y * sin), max_scale)
        scale_y = min(1 / math.hypot(step_x * sin, step_y * cos), max_scale)
        area_size = (max(round((y1 - y0) * scale_y), 1), max(round((x1 - x0) * scale_x), 1))
        scale_x, scale_y = area_size[1] / (x1 - x0), area_size[0] / (y1 - y0)
        a, b = step_x * cos * scale_x, -step_y * sin * scale_x
        d, e = step_x * sin * scale_y, step_y * cos * scale_y
        middle_y, middle_x = content[0] / 2, content[1] / 2
        affine = (
            a,
            b,
            (x - x0) * scale_x - a * middle_x - b * middle_y,
            d,
            e,
            (y - y0) * scale_y - d * middle_x - e * middle_y,
        )
        reach_x, reach_y = 2 * half_x - (x1 - x0), 2 * half_y - (y1 - y0)
        return cls(area, area_size, content, affine, max(reach_x, reach_y) > 1e-6, flip)

    @property
    def photo_size(self) -> tuple[float, float]:
        """Height, width at which the whole photo would be drawn: what decoding must provide."""
        x0, y0, x1, y1 = self.area
        return self.area_size[0] / (y1 - y0), self.area_size[1] / (x1 - x0)

    def image(self, pixels: images.Pixels) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of the crop; the mean pixel outside the photo."""
        image = images.resample(pixels, self.area, self.area_size)
        return np.asarray(self._turn(image, Image.Resampling.BILINEAR, _MEAN_PIXEL))

    def mask(self, area: Bool[np.ndarray, "a b"]) -> UInt8[np.ndarray, "h w"]:
        """The mask of the crop, 1 for foreground, from that of the area at `area_size`."""
        return np.asarray(self._turn(_grey(area), Image.Resampling.NEAREST, 0))

    def inside(self) -> Bool[np.ndarray, "h w"]:
        """Which pixels of the crop lie in the photo."""
        if not self.beyond:
            return np.ones(self.content, bool)
        return self.mask(np.ones(self.area_size, bool)) > 0

    def _turn(self, image: Image.Image, method: Image.Resampling, fill: Any) -> Image.Image:
        if self.affine is not None:
            size = self.content[::-1]
            image = image.transform(
                size, Image.Transform.AFFINE, self.affine, method, fillcolor=fill
            )
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def _grey(mask: Bool[np.ndarray, "a b"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(mask, np.uint8))


def on_canvas(
    crops: Sequence[np.ndarray | None], canvas: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "n H W 3"], Float[np.ndarray, "n 2"]]:
    """Crops at the top left of canvases of zeros, and the sizes of their content; None has none."""
    result = np.zeros((len(crops), *canvas, 3), np.uint8)
    sizes = np.zeros((len(crops), 2), np.float32)
    for slot, crop in enumerate(crops):
        if crop is not None:
            sizes[slot] = crop.shape[:2]
            result[slot, : crop.shape[0], : crop.shape[1]] = crop
    return result, sizes
