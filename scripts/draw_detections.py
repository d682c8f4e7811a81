"""Draws detections next to the ground truth on photos of a dataset, boxes and masks.

    python -m scripts.draw_detections --dataset=DIR --split=validation --detections=x.parquet \\
        --output=pictures

Left the boxes of the dataset, right the detections with class and score, one JPEG a photo, and
`overview.jpg` with the first six. Of a split, the photos with the most classes, then with the most
boxes in the ground truth are drawn; --image_ids chooses others.
"""

import re
from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath
from PIL import ImageOps

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.masks.dataset_masks import MaskReader
from common.report.panels import choose_images, read_drawings, stack, truth_and_detections
from common.report.photo_drawing import Drawing, save_jpeg

MAX_OVERVIEW = 6  # photos in overview.jpg
OVERVIEW_WIDTH = 840  # pixels of one photo with both its panels there


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
        picture = truth_and_detections(dataset, index, detections[index], masks, side)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", dataset.image_id(index))  # ids may hold slashes
        paths.append(output / f"{name}.jpg")
        save_jpeg(picture, paths[-1])
        pictures.append(picture)
    paths.append(output / "overview.jpg")
    small = [ImageOps.contain(p, (OVERVIEW_WIDTH, p.height)) for p in pictures[:MAX_OVERVIEW]]
    save_jpeg(stack(small), paths[-1])
    return paths


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
