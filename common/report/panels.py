"""Ground truth and detections of a dataset's photos side by side."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.masks import rle
from common.masks.dataset_masks import MaskReader
from common.report.photo_drawing import Drawing, class_colour, draw_boxes, drawing_of, open_photo
from common.tables import DetectionsReader

GAP = 8  # pixels between panels, and between pictures of a sheet
CAPTION = 24  # pixels above a panel


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels of equal height from left to right, each below its caption."""
    width = sum(panel.width for _, panel in panels) + GAP * (len(panels) - 1)
    picture = Image.new("RGB", (width, CAPTION + panels[0][1].height), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    x = 0
    for caption, panel in panels:
        draw.text((x + 2, 2), caption, fill=(0, 0, 0), font=font)
        picture.paste(panel, (x, CAPTION))
        x += panel.width + GAP
    return picture


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in two columns, each one put below the shorter column."""
    columns: list[list[Image.Image]] = [[], []]
    for picture in pictures:
        min(columns, key=lambda column: sum(p.height for p in column)).append(picture)
    columns = [column for column in columns if column]
    widths = [max(picture.width for picture in column) for column in columns]
    heights = [sum(picture.height + GAP for picture in column) - GAP for column in columns]
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) - 1), max(heights)), (255,) * 3)
    x = 0
    for column, width in zip(columns, widths, strict=True):
        y = 0
        for picture in column:
            sheet.paste(picture, (x, y))
            y += picture.height + GAP
        x += width + GAP
    return sheet


def choose_images(dataset: Dataset, split: str, image_ids: Sequence[str], limit: int) -> list[int]:
    """Indices of the photos to draw: those named, else the ones of the split that show the most.

    Raises:
      UserError: an id that the dataset or the split does not have.
    """
    members = dataset.split(split)
    if image_ids:
        indices = dataset.find_images(image_ids).tolist()
        for image_id, index in zip(image_ids, indices, strict=True):
            if index < 0 or index not in members:
                raise UserError(f"--image_ids: {image_id!r} is not in split {split!r}")
        return indices
    counts = dataset.box_offsets[members + 1] - dataset.box_offsets[members]
    classes = [len(np.unique(dataset.image_boxes(index)[1])) for index in members]
    order = np.lexsort((-counts, -np.array(classes, int)))
    return [int(index) for index in members[order[:limit]]]


def ground_truth(
    dataset: Dataset, index: int, masks: MaskReader | None, size: tuple[int, int]
) -> Drawing:
    """Boxes of the dataset, and masks in a frame of height, width `size`.

    The class is written where there is more than one. Objects have the colours of their classes;
    with masks, where boxes alone would not tell neighbours apart, each has its own.
    """
    boxes, classes, _ = dataset.image_boxes(index)
    several = len(np.unique(classes)) > 1
    names = [dataset.class_names[c] if several else "" for c in classes]
    if masks is None:
        return Drawing(boxes, [class_colour(c) for c in classes], names)
    rows = np.arange(*dataset.box_offsets[index : index + 2])
    counts = [masks.rle(row, size) for row in rows]
    drawn = [None if text is None else rle.decode(text, size) for text in counts]
    return Drawing(boxes, [class_colour(i) for i in range(len(rows))], names, drawn)


def read_drawings(
    path: epath.Path, dataset: Dataset, indices: Sequence[int], min_score: float, max_boxes: int
) -> dict[int, Drawing]:
    """Detections of the given images, streamed: a table of millions of rows fits.

    Raises:
      UserError: the table is broken, of other classes, or does not cover an image.
    """
    reader = DetectionsReader(path)
    index_of = {}
    for index in indices:
        code = reader.image_codes.get(dataset.image_id(index))
        if code is None:
            raise UserError(f"{path}: image {dataset.image_id(index)!r} is not covered by it")
        index_of[code] = index
    drawings = {index: Drawing(np.zeros((0, 4)), [], []) for index in indices}
    names = dict(zip(dataset.class_labels, dataset.class_names, strict=True))
    for chunk in reader.chunks(dataset.class_labels, masks=reader.has_masks):
        for code in index_of.keys() & set(chunk.image_index.tolist()):
            # Rows of an image are sorted by score: the best first.
            rows = np.flatnonzero((chunk.image_index == code) & (chunk.scores >= min_score))
            drawings[index_of[code]] = drawing_of(chunk.take(rows[:max_boxes]), names)
    return drawings


def truth_and_detections(
    dataset: Dataset, index: int, detected: Drawing, masks: MaskReader | None, side: int
) -> Image.Image:
    """A photo twice, `side` pixels long: with the dataset's boxes (and masks), with detections.

    Raises:
      UserError: the photo is missing or broken.
    """
    photo = open_photo(dataset.image_file(index), dataset.image_sizes[index], side)
    truth = ground_truth(dataset, index, masks, (photo.height, photo.width))
    return side_by_side(
        [
            (f"ground truth: {len(truth.boxes)} boxes", draw_boxes(photo, truth)),
            (f"detections: {len(detected.boxes)} boxes", draw_boxes(photo, detected)),
        ]
    )
