"""Draws what a detector is fed: the batches of a config, as training makes them.

    python -m scripts.draw_batches --config=configs/detection/pod512_elaborate.py \\
        --config.data.dir=DIR --output=pictures --config.data.batch_size=16

One JPEG a slot and `overview.jpg` with the first sixteen. Objects have the colours of their classes
and, in runs with masks, their masks; boxes of the class that the slot was drawn for are thick,
regions in which nothing is background are white and crossed out, the padding of the canvas is
black. The caption tells the photo, its size, the drawn class and what is not known of the photo.
"""

import re

import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageDraw, ImageOps

from common.data.batches import Example
from common.data.dataset import Dataset
from common.data.input import train_batches
from common.data.plans.plan import TrainPlan, train_plan
from common.io import run_flags
from common.io.commands import run_main
from common.io.errors import UserError
from common.report.panels import side_by_side, stack
from common.report.photo_drawing import Drawing, class_colour, draw_boxes, save_jpeg
from common.training.command import open_dataset
from detection.refine import open_proposals
from detection.settings import RunSettings, read_run

MIN_WIDTH = 512  # pixels that a canvas is enlarged to
MAX_OVERVIEW = 16  # slots in overview.jpg
OVERVIEW_WIDTH = 560  # pixels of a slot there
_REGION = (255, 255, 255)
_WIDE = 4  # pixels of the outlines of the drawn class


def object_masks(batch: Example, slot: int, shape: tuple[int, int]) -> list[np.ndarray | None]:
    """Masks of the objects of a slot on its canvas of height, width `shape`."""
    masks: list[np.ndarray | None] = []
    for place in np.flatnonzero(batch["gt_valid"][slot]):
        if not batch["gt_has_mask"][slot, place]:
            masks.append(None)
            continue
        x0, y0, x1, y1 = batch["gt_boxes"][slot, place].tolist()
        left, top = int(x0), int(y0)
        size = (max(round(x1) - left, 1), max(round(y1) - top, 1))
        crop = Image.fromarray(np.unpackbits(batch["gt_masks"][slot, place], axis=1))
        whole = Image.new("L", shape[::-1])
        whole.paste(crop.resize(size, Image.Resampling.NEAREST), (left, top))
        masks.append(np.asarray(whole) > 0)
    return masks


def draw_slot(batch: Example, slot: int, dataset: Dataset) -> Image.Image:
    """The canvas of a slot with all that the batch says of it."""
    valid = batch["gt_valid"][slot]
    canvas = Image.fromarray(batch["image"][slot])
    scale = -(-MIN_WIDTH // canvas.width)
    photo = canvas.resize((scale * canvas.width, scale * canvas.height))
    boxes, classes = batch["gt_boxes"][slot][valid] * scale, batch["gt_classes"][slot][valid]
    group_of = batch["gt_group_of"][slot][valid]
    size = np.tile(photo.size, 2)
    names = [
        dataset.class_names[c] + (" (group)" if group else "")
        for c, group in zip(classes.tolist(), group_of.tolist(), strict=True)
    ]
    masks = object_masks(batch, slot, (canvas.height, canvas.width)) if "gt_masks" in batch else []
    colours = [class_colour(c) for c in classes.tolist()]
    panel = draw_boxes(photo, Drawing(boxes / size, colours, names, masks))
    draw = ImageDraw.Draw(panel)
    for box in boxes[classes == batch["drawn_class"][slot]].tolist():
        draw.rectangle(box, outline=class_colour(int(batch["drawn_class"][slot])), width=_WIDE)
    for region in batch["ignore_boxes"][slot][batch["ignore_valid"][slot]] * scale:
        x0, y0, x1, y1 = region.tolist()
        draw.rectangle((x0, y0, x1, y1), outline=_REGION, width=1)
        draw.line((x0, y0, x1, y1), fill=_REGION)
        draw.line((x0, y1, x1, y0), fill=_REGION)
    if "proposals" in batch:
        for box in (batch["proposals"][slot][batch["proposal_valid"][slot]] * scale).tolist():
            draw.rectangle(box, outline=(160, 160, 160), width=1)
    return panel


def caption(batch: Example, slot: int, plan: TrainPlan, dataset: Dataset) -> str:
    index, drawn = int(batch["image_index"][slot]), int(batch["drawn_class"][slot])
    if not batch["image_valid"][slot]:
        return f"{plan.image_name(index)}: unreadable"
    height, width = batch["original_size"][slot].tolist()
    text = f"{plan.image_name(index)}, {width}x{height}"
    if drawn >= 0:
        text += f", drawn for {dataset.class_names[drawn]}"
    if "class_known" in batch:
        text += f", {np.count_nonzero(~batch['class_known'][slot])} classes unknown"
    if "labels" in batch:
        counts = [np.count_nonzero(batch["labels"][slot] == value) for value in (1, -1)]
        text += f", {counts[0]} present, {counts[1]} absent"
    return text


def draw_batches(
    settings: RunSettings, start_step: int, num_steps: int, limit: int, output: epath.Path
) -> list[epath.Path]:
    """Writes a picture of each slot of some steps, and overview.jpg; returns their paths.

    Raises:
      UserError: the dataset or a photo cannot be read.
    """
    data = settings.data
    dataset = open_dataset(data.directory)
    plan = train_plan(dataset, data, settings.seed)
    batches = train_batches(
        dataset,
        plan,
        data,
        seed=settings.seed,
        start_step=start_step,
        num_steps=num_steps,
        proposals=open_proposals(settings, dataset),
    )
    output.mkdir(parents=True, exist_ok=True)
    paths: list[epath.Path] = []
    pictures: list[Image.Image] = []
    for step, batch in enumerate(batches, start=start_step):
        for slot in range(min(len(batch["image"]), limit - len(paths))):
            panel = draw_slot(batch, slot, dataset)
            picture = side_by_side([(caption(batch, slot, plan, dataset), panel)])
            name = re.sub(r"[^A-Za-z0-9._-]", "_", plan.image_name(int(batch["image_index"][slot])))
            paths.append(output / f"{step:06d}_{slot:04d}_{name}.jpg")
            save_jpeg(picture, paths[-1])
            if len(pictures) < MAX_OVERVIEW:
                pictures.append(ImageOps.contain(picture, (OVERVIEW_WIDTH, picture.height)))
        if len(paths) == limit:
            break
    paths.append(output / "overview.jpg")
    save_jpeg(stack(pictures), paths[-1])
    return paths


def define_flags() -> None:
    run_flags.define_flags(config_required=False, workdir_required=False)
    flags.DEFINE_string("output", None, "Folder to write the pictures into.", required=True)
    flags.DEFINE_integer("start_step", 0, "First step.", lower_bound=0)
    flags.DEFINE_integer("steps", 1, "Steps drawn.", lower_bound=1)
    flags.DEFINE_integer("max_images", 64, "Slots drawn at most.", lower_bound=1)


def main() -> None:
    values = flags.FLAGS
    if values.config is None:
        raise UserError("--config: missing, expected the config of a detector (or --workdir)")
    paths = draw_batches(
        read_run(values.config),
        values.start_step,
        values.steps,
        values.max_images,
        epath.Path(values.output),
    )
    print(f"wrote {len(paths)} pictures to {values.output}, all in one: {paths[-1]}", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
