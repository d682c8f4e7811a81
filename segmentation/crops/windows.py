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

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from common.data.cut import Cut
from common.data.placement import turned_extent
from common.data.rotation import turn_angles
from common.io.settings import check

NUM_DRAWS = 8  # random numbers of a crop


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

    def cut(self, row: int, photo_size: tuple[int, int], *, enlarge_first: bool = False) -> Cut:
        """How to read one of the windows from a photo of this height, width."""
        x, y = self.centre[row].tolist()
        sides, content = self.sides[row].tolist(), tuple(self.content[row].tolist())
        flip, angle = bool(self.flip[row]), float(self.angle[row])
        if not angle:
            (photo_height, photo_width), (half_y, half_x) = photo_size, (side / 2 for side in sides)
            x0, x1 = max(x - half_x, 0.0), min(x + half_x, float(photo_width))
            y0, y1 = max(y - half_y, 0.0), min(y + half_y, float(photo_height))
            area = (x0 / photo_width, y0 / photo_height, x1 / photo_width, y1 / photo_height)
            return Cut.upright(area, content, flip)
        # Photo pixels for a pixel of the crop, along its own axes.
        step_y, step_x = sides[0] / content[0], sides[1] / content[1]
        cos, sin = math.cos(angle), math.sin(angle)
        a, b, d, e = step_x * cos, -step_y * sin, step_x * sin, step_y * cos
        middle_y, middle_x = content[0] / 2, content[1] / 2
        to_photo = (
            *(a, b, x - a * middle_x - b * middle_y),
            *(d, e, y - d * middle_x - e * middle_y),
        )
        return Cut.turned(to_photo, content, photo_size, flip, enlarge_first=enlarge_first)


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
        angle = turn_angles(deviations, draws[:, 4:6])
        width, height = (corners[:, 1] - corners[:, 0]).T
        sides = np.stack(turned_extent(width, height, angle, ellipse=True)[::-1], axis=1)
        return Windows(
            centre=corners.mean(axis=1),
            sides=sides,
            angle=angle,
            flip=self.flip & (draws[:, 7] < 0.5),
            content=self.size.content(sides, draws[:, 6]),
        )


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
