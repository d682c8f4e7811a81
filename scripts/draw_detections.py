"""Draws detections next to the ground truth on photos of a dataset, boxes and masks.

    python -m scripts.draw_detections --dataset=DIR --split=validation --detections=x.parquet \\
        --output=pictures

Left the boxes of the dataset, right the detections with class and score, one JPEG a photo, and
`overview.jpg` with the first six. Of a split, the photos with the most classes, then with the most
boxes in the ground truth are drawn; --image_ids chooses others.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.masks import rle
from common.masks.dataset_masks import MaskReader
from common.report.photo_drawing import (
    Drawing,
    class_colour,
    draw_boxes,
    drawing_of,
    open_photo,
    save_jpeg,
)
from common.tables import DetectionsReader

GAP = 8  # pixels between the two panels and between rows of the overview
CAPTION = 24  # pixels above a panel
MAX_OVERVIEW = 6  # photos in overview.jpg
OVERVIEW_WIDTH = 840  # pixels of one photo with both its panels there


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


def draw_split(
    dataset: Dataset,
    indices: Sequence[int],
    detections: Mapping[int, Drawing],
    output: epath.Path,
    side: int,
) -> list[epath.Path]:
    """Writes one picture for each image, and overview.jpg; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    masks = MaskReader(dataset) if dataset.mask_offsets is not None else None
    pictures, paths = [], []
    for index in indices:
        photo = open_photo(dataset.image_file(index), dataset.image_sizes[index], side)
        truth = ground_truth(dataset, index, masks, (photo.height, photo.width))
        detected = detections[index]
        picture = side_by_side(
            [
                (f"ground truth: {len(truth.boxes)} boxes", draw_boxes(photo, truth)),
                (f"detections: {len(detected.boxes)} boxes", draw_boxes(photo, detected)),
            ]
        )
        name = re.sub(r"[^A-Za-z0-9._-]", "_", dataset.image_id(index))  # ids may hold slashes
        paths.append(output / f"{name}.jpg")
        save_jpeg(picture, paths[-1])
        pictures.append(picture)
    paths.append(output / "overview.jpg")
    small = [ImageOps.contain(p, (OVERVIEW_WIDTH, p.height)) for p in pictures[:MAX_OVERVIEW]]
    save_jpeg(stack(small), paths[-1])
    return paths


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


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", None, "Split whose photos are drawn.", required=True)
    flags.DEFINE_string("detections", None, "Detections table: file or folder.", required=True)
    flags.DEFINE_string("output", None, "Folder to write the pictures into.", required=True)
    flags.DEFINE_list("image_ids", [], "Photos to draw, in this order.")
    flags.DEFINE_integer("max_images", 8, "Photos drawn.", lower_bound=1)
    flags.DEFINE_float("min_score", 0.4, "Detections below stay out.", 0.0)
    flags.DEFINE_integer("max_boxes", 100, "Detections drawn on a photo.", lower_bound=1)
    flags.DEFINE_integer("side", 640, "Longest side of a drawn photo, pixels.", lower_bound=64)


def main():
    values = flags.FLAGS
    dataset = Dataset.open(values.dataset)
    indices = choose_images(dataset, values.split, values.image_ids, values.max_images)
    if not indices:
        raise UserError(f"{values.dataset}: split {values.split!r} has no images")
    drawings = read_drawings(
        epath.Path(values.detections), dataset, indices, values.min_score, values.max_boxes
    )
    paths = draw_split(dataset, indices, drawings, epath.Path(values.output), values.side)
    print(f"wrote {len(paths)} pictures to {values.output}, all in one: {paths[-1]}", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
