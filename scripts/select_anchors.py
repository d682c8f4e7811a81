"""Chooses anchors by k-means over the boxes of a dataset, and tells how many boxes they reach.

    python -m scripts.select_anchors --dataset=DIR --split=train --canvas=800,1333 \\
        --num_ratios=6 --num_scales=3 --output=anchors.json

Boxes are measured as training sees them, on photos resized to the canvas. The k-means is that of
`detection.assign.anchor_selection`: on log width and log height, over a grid of ratios and scales
that every level of the pyramid has. Compared with the chosen anchors are the usual 3 (scale 8) and
the 18 of the paper (section 6), whose ratios can be read as height/width or width/height.

Recall is the share of boxes that some anchor overlaps by IoU 0.5 (0.7): 'on the grid' with the
anchors where they are, those that cross the border too, exactly; 'by shape' with an anchor on the
middle of each box, the upper bound. The class mean counts every class alike, as mAP does.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from common.convert.photos import read_sizes
from common.data.dataset import Dataset
from common.data.images import canvas_shape
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.progress import Progress
from common.tables.ranges import rows_of
from detection.assign.anchor_selection import (
    AnchorSet,
    Recall,
    ShapeHistograms,
    best_ratios,
    best_scales,
    fitted_sizes,
    has_area,
)

USUAL = AnchorSet("usual 3", (8.0,), (0.5, 1.0, 2.0))
PAPER_SCALES, PAPER_RATIOS = (8.0, 11.0, 14.0), (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
_IMAGES = 1 << 15  # of a piece


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("split", "train", "Split of the dataset.")
    flags.DEFINE_string("output", None, "JSON file to write.", required=True)
    flags.DEFINE_list("canvas", ["800", "1333"], "Short, long side that photos are fitted into.")
    flags.DEFINE_integer("pad_multiple", 32, "The canvas is padded up to multiples of it.")
    flags.DEFINE_list("strides", ["4", "8", "16", "32", "64"], "Of the levels, pixels.")
    flags.DEFINE_float("centre", 0.5, "Of an anchor in its cell (config.model.anchors.centre).")
    flags.DEFINE_integer("num_ratios", 6, "Ratios to choose.", lower_bound=1)
    flags.DEFINE_integer("num_scales", 3, "Scales to choose.", lower_bound=1)
    flags.DEFINE_integer("max_images", 0, "A random part of so many images; 0: all.", lower_bound=0)


def main():
    f = flags.FLAGS
    canvas = _whole_numbers("canvas", f.canvas)
    strides = _whole_numbers("strides", f.strides)
    if len(canvas) != 2:
        raise UserError(f"--canvas: found {','.join(f.canvas)}, expected short,long side")
    dataset = Dataset.open(f.dataset)
    indices = choose_images(dataset, f.split, f.max_images)
    sizes = photo_sizes(dataset, indices)

    shapes, count = ShapeHistograms(), 0
    for boxes, _ in pieces(dataset, indices, sizes, canvas, "shapes"):
        shapes.add(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        count += len(boxes)
    if not count:
        raise UserError(f"{f.dataset}: split {f.split!r} has no boxes, expected some")
    chosen = AnchorSet(
        "chosen",
        tuple(round(scale, 2) for scale in best_scales(shapes, strides, f.num_scales)),
        tuple(round(ratio, 3) for ratio in best_ratios(shapes, f.num_ratios)),
    )
    sets = [
        chosen,
        USUAL,
        AnchorSet("paper 18, h/w", PAPER_SCALES, PAPER_RATIOS, "h/w"),
        AnchorSet("paper 18, w/h", PAPER_SCALES, PAPER_RATIOS, "w/h"),
    ]
    # Anchors of landscape and of portrait canvases: those of one photo reach as far as either.
    padded = canvas_shape((max(canvas), max(canvas)), f.pad_multiple)
    recalls = [Recall(s, padded, strides, dataset.num_classes, f.centre) for s in sets]
    for boxes, classes in pieces(dataset, indices, sizes, canvas, "recall"):
        for recall in recalls:
            recall.add(boxes, classes)

    results = {"dataset": str(f.dataset), "split": f.split, "canvas": canvas, "strides": strides}
    results |= {"images": len(indices), "boxes": count, "sets": {}}
    for anchors, recall in zip(sets, recalls, strict=True):
        results["sets"][anchors.name] = {
            "scales": anchors.scales,
            "ratios": anchors.ratios,
            "ratio_convention": anchors.convention,
            "anchors": anchors.size,
            **recall.result(),
        }
    print(report(results), flush=True)
    write_json(f.output, results)
    print(f"wrote {f.output}")


def choose_images(dataset: Dataset, split: str, max_images: int) -> np.ndarray:
    """Rows of the split's images with boxes, ascending; a fixed random part of them if asked."""
    indices = np.sort(dataset.split(split))
    indices = indices[dataset.box_offsets[indices + 1] > dataset.box_offsets[indices]]
    if 0 < max_images < len(indices):
        rng = np.random.default_rng(0)
        indices = np.sort(rng.choice(indices, max_images, replace=False))
    return indices


def photo_sizes(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """(n, 2) height, width; where the annotations have none, from the headers of the photos.

    Raises:
      UserError: a size is in neither.
    """
    sizes = np.array(dataset.image_sizes[indices])
    unknown = np.flatnonzero((sizes <= 0).any(axis=1))
    if len(unknown):
        files = [dataset.image_file(indices[place]) for place in unknown]
        if any("://" in file for file in files[:1]):
            raise UserError(
                f"{dataset.directory}: the sizes of {len(unknown)} images are unknown, and the "
                f"photos ({files[0]}) are not on this machine; expected a directory prepared with "
                "the photo sizes, or --max_images with photos copied here"
            )
        sizes[unknown], readable = read_sizes(Path("/"), [os.path.abspath(file) for file in files])
        if not readable.all():
            raise UserError(f"{files[int(readable.argmin())]}: no readable photo, size unknown")
    return sizes


def pieces(
    dataset: Dataset, indices: np.ndarray, sizes: np.ndarray, canvas: Sequence[int], task: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields boxes with an area in canvas pixels, and their classes, of some images at a time."""
    progress = Progress(len(indices), what=task)
    for start in range(0, len(indices), _IMAGES):
        part = indices[start : start + _IMAGES]
        owner, rows = rows_of(dataset.box_offsets, part)
        full = fitted_sizes(sizes[start : start + _IMAGES], (canvas[0], canvas[1]))[owner][
            :, [1, 0, 1, 0]
        ]
        boxes = (np.asarray(dataset.boxes[rows]) * full).astype(np.float32)
        keep = has_area(boxes)
        yield boxes[keep], np.asarray(dataset.box_classes[rows])[keep]
        progress.report(start + len(part))


def report(results: dict) -> str:
    """The table that is printed."""
    chosen = results["sets"]["chosen"]
    lines = [
        f"{results['boxes']} boxes of {results['images']} images on a canvas of "
        f"{'x'.join(map(str, results['canvas']))}",
        f"chosen scales (in strides): {', '.join(map(str, chosen['scales']))}",
        f"chosen ratios (h/w):        {', '.join(map(str, chosen['ratios']))}",
        "",
        f"{'':<15}{'anchors':>8}{'recall@0.5':>12}{'class mean':>12}{'by shape':>10}"
        f"{'recall@0.7':>12}{'by shape':>10}{'mean IoU':>10}",
    ]
    for name, figures in results["sets"].items():
        lines.append(
            f"{name:<15}{figures['anchors']:>8}"
            f"{100 * figures['recall@0.5/grid']:>12.2f}"
            f"{100 * figures['class_mean_recall@0.5/grid']:>12.2f}"
            f"{100 * figures['recall@0.5/shape']:>10.2f}"
            f"{100 * figures['recall@0.7/grid']:>12.2f}"
            f"{100 * figures['recall@0.7/shape']:>10.2f}"
            f"{figures['mean_iou/grid']:>10.4f}"
        )
    by_reading = {
        reading: results["sets"][f"paper 18, {reading}"]["recall@0.5/grid"]
        for reading in ("h/w", "w/h")
    }
    better = max(by_reading, key=lambda reading: by_reading[reading])
    lines.append(f"of the two readings of the paper's ratios, {better} reaches more of these boxes")
    return "\n".join(lines)


def _whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
    if not texts or not all(text.strip().isdecimal() and int(text) for text in texts):
        raise UserError(f"--{name}: found {','.join(texts)!r}, expected whole numbers from 1 on")
    return [int(text) for text in texts]


if __name__ == "__main__":
    define_flags()
    run_main(main)
