"""Where a photo lies on a canvas: resized, turned, cropped, mirrored; its boxes and pixels there.

One affine map says all of it (`Geometry`): training with and without augmentation, inference at
several sizes, classifiers' crops and the masks of objects have no other.

Shape legend: H, W canvas; h, w its content; n boxes of an image. Sizes are (height, width), boxes
xmin, ymin, xmax, ymax.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8

from common.data import images
from common.data.cut import Affine, Cut

MIN_VISIBLE = 0.1  # share of a box that must lie inside a random crop, else the box is dropped

_LARGE = 4e6  # pixels of a photo of which it pays to decode a part only


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a photo lies on the canvas: resized to `full`, turned, cropped, then mirrored.

    Attributes:
      full: height, width of the whole resized photo in pixels.
      offset: top, left of the crop in it.
      content: height, width of the crop, which is put at the top left of the canvas.
      flip: whether the content is mirrored left to right.
      angle: radians by which the photo is turned about the middle of its frame, from x towards y;
        the frame stays, so corners of the photo leave it and others of it are empty.
    """

    full: tuple[int, int]
    offset: tuple[int, int]
    content: tuple[int, int]
    flip: bool
    angle: float = 0.0

    @property
    def is_cropped(self) -> bool:
        """Whether part of the photo's frame is not on the canvas."""
        return self.content != self.full

    def turn(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the resized photo after turning."""
        height, width = self.full
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = x - width / 2, y - height / 2
        return cos * x - sin * y + width / 2, sin * x + cos * y + height / 2

    def cut(
        self,
        photo_size: tuple[int, int],
        box: Float[np.ndarray, " 4"],
        size: tuple[int, int],
        *,
        enlarge_first: bool = False,
    ) -> Cut:
        """The part of the photo that a box on the canvas shows.

        Args:
          photo_size: height, width of the photo as displayed.
          box: in pixels of the canvas, inside the content.
          size: height, width at which it is drawn.
          enlarge_first: as `Cut.turned`.
        """
        if not self.angle:
            area = photo_windows(np.asarray(box)[None], self)[0]
            return Cut.upright(tuple(area.tolist()), size, self.flip)
        x0, y0, x1, y1 = np.asarray(box, np.float64).tolist()
        if self.flip:
            x0, x1 = self.content[1] - x1, self.content[1] - x0
        return Cut.turned(
            self._to_photo((x0, y0, x1, y1), size, photo_size),
            size,
            photo_size,
            self.flip,
            enlarge_first=enlarge_first,
        )

    def _to_photo(
        self, box: tuple[float, ...], size: tuple[int, int], photo_size: tuple[int, int]
    ) -> Affine:
        """From pixels of a box of the content, not mirrored and drawn at `size`, to the photo's."""
        (height, width), (top, left) = self.full, self.offset
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        step_x, step_y = (box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]
        scale_x, scale_y = photo_size[1] / width, photo_size[0] / height
        x, y = left + box[0] - width / 2, top + box[1] - height / 2
        return (
            *(cos * step_x * scale_x, sin * step_y * scale_x),
            (cos * x + sin * y + width / 2) * scale_x,
            *(-sin * step_x * scale_y, cos * step_y * scale_y),
            (-sin * x + cos * y + height / 2) * scale_y,
        )


def turned_extent(
    width: Float[np.ndarray, " n"],
    height: Float[np.ndarray, " n"],
    angle: float | Float[np.ndarray, " n"],
    *,
    ellipse: bool = False,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Width, height of the upright boxes around turned ones, or around the ellipses in them."""
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    if ellipse:
        return np.hypot(cos * width, sin * height), np.hypot(sin * width, cos * height)
    return cos * width + sin * height, sin * width + cos * height


def fit(
    size: tuple[int, int],
    canvas: tuple[int, int],
    *,
    scale: float = 1.0,
    crop: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
) -> Geometry:
    """Places a photo on a canvas.

    The photo is resized, keeping its aspect, to the largest size that fits. On an 800x1333 canvas
    a landscape photo gets the usual short side 800, long side at most 1333; a portrait photo gets
    it on 1333x800 (`common.data.canvases`).

    Args:
      size: height, width of the photo as displayed.
      canvas: height, width without padding.
      scale: multiplies the fitted size. What then exceeds the canvas is cropped.
      crop: top, left of the crop in [0, 1) of the room there is.
      flip: mirror left to right.
    """
    ratio = scale * min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, math.floor(side * ratio + 0.5)) for side in size)
    content = min(height, canvas[0]), min(width, canvas[1])
    top, left = (
        int(share * (side - seen + 1))
        for share, side, seen in zip(crop, (height, width), content, strict=True)
    )
    return Geometry((height, width), (top, left), content, flip)


def transform_boxes(
    boxes: Float32[np.ndarray, "n 4"], geometry: Geometry, *, ellipse: bool = False
) -> tuple[Float32[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Normalised boxes to canvas pixels, with the exact scale factors of the resized photo.

    Args:
      boxes: of the photo.
      geometry: how it lies on the canvas.
      ellipse: a turned box becomes the box around the ellipse that fills it, about what an
        annotator would draw around a turned object; else the hull of its corners.

    Returns:
      Boxes clipped to the content, and which of them to keep: those with an area, of which at least
      `MIN_VISIBLE` is inside the crop.
    """
    height, width = geometry.full
    top, left = geometry.offset
    low, high = (0, 0), geometry.content[::-1]
    whole = np.asarray(boxes, np.float32) * np.array([width, height, width, height], np.float32)
    if geometry.angle:
        whole = _turned(whole, geometry, ellipse)
    moved = whole - np.array([left, top, left, top], np.float32)
    if geometry.flip:
        moved[:, [0, 2]] = np.float32(geometry.content[1]) - moved[:, [2, 0]]
    clipped = np.clip(
        moved, np.array([*low, *low], np.float32), np.array([*high, *high], np.float32)
    )
    area = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    whole_area = np.prod(whole[:, 2:] - whole[:, :2], axis=1)
    keep = np.all(clipped[:, 2:] > clipped[:, :2], axis=1) & (area >= MIN_VISIBLE * whole_area)
    return clipped, keep


def _turned(
    boxes: Float32[np.ndarray, "n 4"], geometry: Geometry, ellipse: bool
) -> Float32[np.ndarray, "n 4"]:
    """Boxes of the resized photo after turning."""
    corners = boxes.astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    x, y = geometry.turn(*((corners[:, :2] + corners[:, 2:]) / 2).T)
    wide, high = turned_extent(sides[:, 0], sides[:, 1], geometry.angle, ellipse=ellipse)
    # A box without area stays one: it is not kept.
    wide, high = (np.where(sides.min(axis=1) > 0, side, 0.0) for side in (wide, high))
    around = [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2]
    return np.stack(around, axis=1).astype(np.float32)


def photo_windows(
    boxes: Float32[np.ndarray, "n 4"], geometry: Geometry
) -> Float64[np.ndarray, "n 4"]:
    """Normalised boxes of the photo from canvas pixels: `transform_boxes` reversed, not turned."""
    (height, width), (top, left) = geometry.full, geometry.offset
    photo = np.array(boxes, np.float64)
    if geometry.flip:
        photo[:, [0, 2]] = geometry.content[1] - photo[:, [2, 0]]
    return (photo + [left, top, left, top]) / [width, height, width, height]


def draw_content(photo: images.Photo, geometry: Geometry) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a photo and draws what its canvas shows of it.

    Bilinear with antialiasing; greyscale becomes three equal channels, 16 bits lose their low byte,
    transparency is ignored. Where a turned photo does not reach, the mean pixel.

    Raises:
      ImageError: the data are damaged or end early.
    """
    height, width = geometry.content
    cut = geometry.cut(photo.size, np.array([0, 0, width, height]), geometry.content)
    if cut.affine is None:
        return cut.image(images.decode(photo, geometry.full))
    if math.prod(photo.size) < _LARGE:
        return cut.image(images.decode(photo, cut.photo_size))
    return cut.image(images.decode(photo, cut.photo_size, cut.area))


def draw(
    photo: images.Photo, geometry: Geometry, shape: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """`draw_content` at the top left of a canvas of height, width `shape`; padding is 0."""
    canvas = np.zeros((*shape, 3), np.uint8)
    content = draw_content(photo, geometry)
    canvas[: content.shape[0], : content.shape[1]] = content
    return canvas
