"""Looks at a dataset and writes a config that fits, with a reason for each choice.

    python -m scripts.new_run --dataset=DIR --output=configs/my_run.py
    python -m detection.train --config=configs/my_run.py --workdir=WORK

Canvas, anchors (k-means), batch, schedule, sampler and heads follow the photos, the boxes and the
classes of the training split, and the device at hand; --device=gpu|tpu|cpu writes for another one.
The file is a config as any other: read it, change it. It is a start, from recipes that were
measured, not the best that can be had.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from common.data.dataset import Dataset
from common.data.frequencies import class_frequencies
from common.data.sources import single_source
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.readiness import evaluation_split
from common.metrics.rules import metric_of
from common.tables.ranges import rows_of
from detection import recipe
from detection.assign.anchor_selection import (
    AnchorSet,
    Recall,
    ShapeHistograms,
    best_ratios,
    best_scales,
)
from detection.recipe import Choice, Device, Facts
from scripts.select_anchors import USUAL, choose_images, photo_sizes, pieces

_LOOKED_AT = 5000  # photos, a random part of larger sets
_GRIDS = ((1, 3), (2, 3), (3, 3), (3, 5))  # scales and ratios that are tried
_STRIDES = (4, 8, 16, 32, 64)
_WIDTH = 96
_ACCELERATORS = {"gpu": 24.0, "tpu": 16.0}  # GiB, where they are not here to be asked


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("output", "configs/my_run.py", "Python file to write.")
    flags.DEFINE_string("pretrained", "", "Weights of the trunk, of scripts.convert_weights.")
    flags.DEFINE_string("split", "train", "Training split.")
    flags.DEFINE_enum("device", "here", ("here", "cpu", "gpu", "tpu"), "To train on.")
    flags.DEFINE_boolean("overwrite", False, "Replace a file that is there.")


def main() -> None:
    values = flags.FLAGS
    output = Path(values.output)
    if output.suffix != ".py":
        raise UserError(f"--output={output}: expected a name that ends with .py")
    if output.exists() and not values.overwrite:
        raise UserError(f"--output={output}: is there already; --overwrite replaces it")
    dataset = Dataset.open(values.dataset)
    device = find_device(values.device)
    choices = choose(dataset, values.split, device, values.pretrained)
    write_text(output, render(output, dataset, device, choices))
    for choice in choices:
        for name, value in choice.fields.items():
            print(f"config.{name} = {literal(value)}")
    print(f"wrote {output}; python -m detection.train --config={output} --workdir=WORK")


def find_device(wanted: str) -> Device:
    """What is here, or one accelerator of another kind."""
    devices = jax.devices()
    platform = devices[0].platform
    if wanted not in ("here", platform):
        return Device(wanted, wanted, 1, _ACCELERATORS.get(wanted, 0.0))
    stats = {} if platform == "cpu" else devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit", 0) / 2**30
    return Device(platform, devices[0].device_kind, len(devices), memory)


def choose(dataset: Dataset, split: str, device: Device, pretrained: str) -> list[Choice]:
    """All choices, in the order of the file.

    Raises:
      UserError: no such split, or no boxes in it.
    """
    images = choose_images(dataset, split, _LOOKED_AT)
    if not len(images):
        raise UserError(f"{dataset.directory}: split {split!r} has no boxes, expected some")
    sizes = photo_sizes(dataset, images)
    facts = gather(dataset, split, images, sizes)
    canvas = recipe.choose_canvas(facts, device)
    sides = canvas.fields["data.canvas"]
    batch = recipe.choose_batch(facts, device, sides)
    return [
        *recipe.choose_data(facts),
        *recipe.choose_sampler(facts),
        canvas,
        recipe.choose_anchors(*try_anchors(dataset, images, sizes, sides)),
        *recipe.choose_model(facts, device, pretrained),
        batch,
        recipe.choose_schedule(facts, device, batch.fields["data.batch_size"]),
    ]


def gather(dataset: Dataset, split: str, images: np.ndarray, sizes: np.ndarray) -> Facts:
    """What the choices depend on.

    Args:
      dataset: to train on.
      split: to train on.
      images: with boxes, of this split; a part of large ones.
      sizes: height and width of each.
    """
    members = dataset.split(split)
    _, rows = rows_of(dataset.box_offsets, images)
    try:
        eval_split = evaluation_split(dataset, "validation", lambda *_, **__: None)
    except UserError:
        eval_split = ""
    return Facts(
        directory=str(dataset.directory),
        train_split=split,
        eval_split=eval_split,
        sizes=sizes,
        num_photos=len(members),
        boxes_per_photo=np.diff(dataset.box_offsets)[images],
        sides=recipe.share_of_photo(np.asarray(dataset.boxes[rows])),
        photos_of_class=np.array(class_frequencies([single_source(dataset, members)]).images),
        has_masks=dataset.mask_offsets is not None,
        metric=metric_of(dataset),
    )


def try_anchors(
    dataset: Dataset, images: np.ndarray, sizes: np.ndarray, canvas: tuple[int, int]
) -> tuple[list[tuple[AnchorSet, float]], tuple[AnchorSet, float]]:
    """Sets of k-means by ascending size, and the usual one, with what share of boxes they reach."""
    shapes = ShapeHistograms()
    for boxes, _ in pieces(dataset, images, sizes, canvas, "shapes"):
        shapes.add(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    sets = [
        AnchorSet(
            f"{scales}x{ratios}",
            tuple(round(scale, 2) for scale in best_scales(shapes, _STRIDES, scales)),
            tuple(round(ratio, 3) for ratio in best_ratios(shapes, ratios)),
        )
        for scales, ratios in _GRIDS
    ]
    padded = (max(canvas), max(canvas))
    recalls = [Recall(s, padded, _STRIDES, dataset.num_classes) for s in (*sets, USUAL)]
    for boxes, classes in pieces(dataset, images, sizes, canvas, "recall"):
        for recall in recalls:
            recall.add(boxes, classes)
    reached = [recall.result()["class_mean_recall@0.5/grid"] for recall in recalls]
    return list(zip(sets, reached[:-1], strict=True)), (USUAL, reached[-1])


def render(output: Path, dataset: Dataset, device: Device, choices: Sequence[Choice]) -> str:
    """The text of the config."""
    lines = [
        f'"""Written by scripts.new_run for {dataset.directory.name}, to be changed at will.',
        "",
        f"    python -m detection.train --config={output} --workdir=WORK",
        "",
        f"Hardware: {device.count} x {device.kind}.",
        '"""',
        "",
        "import ml_collections",
        "",
        "from configs.detection import base",
        "",
        "",
        "def get_config(arg: str | None = None) -> ml_collections.ConfigDict:",
        "    del arg",
        "    config = base.get_config()",
        f'    config.name = "{output.stem}"',
    ]
    for choice in choices:
        comment = textwrap.wrap(choice.why, _WIDTH - 6)
        lines += ["", *(f"    # {line}" for line in comment)]
        lines += [f"    config.{name} = {literal(value)}" for name, value in choice.fields.items()]
    return "\n".join([*lines, "    return config", ""])


def literal(value: Any) -> str:
    """A value as configs write it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"dict({', '.join(f'{name}={literal(item)}' for name, item in value.items())})"
    return repr(value)


if __name__ == "__main__":
    define_flags()
    run_main(main)
