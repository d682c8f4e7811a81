"""Boxes and masks drawn on photos with Pillow.

Shape legend: n boxes.
"""

import colorsys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.data import images, placement
from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.paths import PathLike
from common.masks import rle
from common.tables import Detections

NORMAL_SIDE = 640  # pixels of a picture; texts and lines of larger ones are larger
OPACITY = 0.45  # of a mask's inside
MASK_SIDE = 1600  # pixels of the longest side, in which masks are drawn


class Drawing(NamedTuple):
    """What is drawn on a photo.

    Attributes:
      boxes: (n, 4) normalised xmin, ymin, xmax, ymax.
      colours: (n,) red, green, blue.
      texts: (n,) written at the box, "" for none.
      masks: (n,) of the whole photo at any resolution, bool, or None; or () for no masks at all.
    """

    boxes: np.ndarray
    colours: Sequence[tuple[int, int, int]]
    texts: Sequence[str]
    masks: Sequence[np.ndarray | None] = ()


def class_colour(index: int) -> tuple[int, int, int]:
    """A bright colour; neighbouring class indices are far apart on the colour wheel."""
    red, green, blue = colorsys.hsv_to_rgb(0.13 + index * 0.618034, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def open_photo(
    path: str, annotated_size: Sequence[int], side: int, *, enlarge: bool = True
) -> Image.Image:
    """The photo as the model sees it, with its longest side at `side` pixels.

    Args:
      path: local file or gs:// address.
      annotated_size: height, width in the dataset, (0, 0) when unknown.
      side: pixels.
      enlarge: False: a smaller photo stays as it is.

    Raises:
      UserError: it is missing or broken.
    """
    try:
        photo = images.open_photo(
            images.read_file(path), (int(annotated_size[0]), int(annotated_size[1]))
        )
        side = side if enlarge else min(side, max(photo.size))
        geometry = placement.fit(photo.size, (side, side))
        return Image.fromarray(placement.draw(photo, geometry, geometry.content))
    except images.ImageError as error:
        raise UserError(f"{path}: cannot read this photo: {error}") from error


def fill_masks(photo: Image.Image, drawing: Drawing) -> Image.Image:
    """A copy of the photo with the masks' insides tinted and their outlines in full colour."""
    pixels = np.asarray(photo, np.float32)
    for mask, colour in zip(drawing.masks, drawing.colours, strict=True):
        if mask is None:
            continue
        sized = Image.fromarray(mask).resize(photo.size, Image.Resampling.NEAREST)
        inside = np.asarray(sized, bool)
        padded = np.pad(inside, 1)
        within = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        opacity = np.where(within, OPACITY, 1.0)[inside, None]
        pixels[inside] += opacity * (np.asarray(colour, np.float32) - pixels[inside])
    return Image.fromarray(pixels.astype(np.uint8))


def draw_boxes(photo: Image.Image, drawing: Drawing) -> Image.Image:
    """A copy of the photo with masks and boxes; texts come last, so that no box hides them."""
    boxes, colours, texts, masks = drawing
    panel = fill_masks(photo, drawing) if masks else photo.copy()
    draw = ImageDraw.Draw(panel)
    scale = max(photo.size) / NORMAL_SIDE
    font = ImageFont.load_default(size=max(11, round(11 * scale)))
    width = max(1 if masks else 2, round(scale if masks else 2 * scale))
    corners = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(photo.size, 2)
    limit = np.tile(photo.size, 2) - 1
    corners = np.clip(corners, 0, limit)
    for box, colour in zip(corners, colours, strict=True):
        draw.rectangle(tuple(box), outline=colour, width=width)
    for box, colour, text in zip(corners, colours, texts, strict=True):
        if not text:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = min(box[0], max(0, photo.width - (right - left) - 2))
        y = max(0, box[1] - (bottom - top) - 2)
        draw.rectangle((x, y, x + right - left + 2, y + bottom - top + 2), fill=colour)
        draw.text((x + 1 - left, y + 1 - top), text, fill=(0, 0, 0), font=font)
    return panel


def drawing_of(detections: Detections, names: Mapping[str, str]) -> Drawing:
    """How the rows of one photo are drawn, best first; objects with masks have own colours.

    Args:
      detections: of one photo.
      names: to show, by label.
    """
    classes, texts = detections.label_index, []
    for index, score in zip(classes, detections.scores, strict=True):
        label = detections.labels[index]
        texts.append(f"{names.get(label, label)} {score:.2f}")
    if detections.masks is None:
        return Drawing(detections.boxes, [class_colour(index) for index in classes], texts)
    counts, sizes = detections.mask_columns()
    masks = [_pixels(*pair) for pair in zip(counts, sizes.tolist(), strict=True)]
    return Drawing(detections.boxes, [class_colour(i) for i in range(len(masks))], texts, masks)


def _pixels(counts: bytes, size: Sequence[int]) -> np.ndarray:
    """A mask no larger than pictures need: those of a large photo would fill the memory."""
    height, width = size
    scale = min(1.0, MASK_SIDE / max(size))
    drawn = (max(round(height * scale), 1), max(round(width * scale), 1))
    return rle.decode(rle.resize([counts], (height, width), drawn)[0], drawn)


def save_jpeg(picture: Image.Image, path: PathLike) -> None:
    with open_atomic(path, "wb") as file:
        picture.save(file, format="JPEG", quality=88)
