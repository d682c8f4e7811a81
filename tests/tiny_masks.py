"""A segmentation problem small enough for tests: bright discs and bars on grey photos."""

from pathlib import Path

import ml_collections
import numpy as np
from PIL import Image

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.masks import rle
from common.tables import DetectionsWriter
from configs.segmentation import hrnet_w48_112

COLOURS = ((220, 60, 40), (60, 80, 230))
SIZE = (48, 64)


def write_dataset(directory: Path, num_images: int = 12, seed: int = 0) -> Path:
    """Writes photos and a dataset directory with the splits "train" and "validation".

    Every photo has a disc and a bar with masks, some a box without a mask and a group-of box.
    """
    rng = np.random.default_rng(seed)
    photos = directory.with_name(directory.name + "_photos")
    photos.mkdir(parents=True)
    labels = ["disc", "bar"]
    height, width = SIZE
    y, x = np.mgrid[:height, :width] + 0.5
    with DatasetWriter(
        directory, "tiny_masks", labels, labels, None, str(photos), has_masks=True
    ) as writer:
        for i in range(num_images):
            pixels = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
            masks = []
            radius = rng.uniform(7, 12)
            centre = rng.uniform([14, 14], [34, 18])
            masks.append((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2)
            lean = rng.uniform(-0.3, 0.3)
            masks.append((abs(x - 48 - lean * (y - 24)) < 4) & (abs(y - 24) < rng.uniform(10, 20)))
            boxes, entries = [], []
            for mask, colour in zip(masks, COLOURS, strict=True):
                pixels[mask] = colour
                rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                counts = rle.encode([mask])[0].decode()
                entries.append({"size": [height, width], "counts": counts})
            classes, flags = [0, 1], [0, 0]
            if i % 3 == 0:
                boxes += [[0, 0, 20, 20], [5, 5, 60, 44]]
                classes, flags = [0, 1, 1, 0], [0, 0, 0, GROUP_OF]
                entries += [None, None]
            Image.fromarray(pixels).save(photos / f"photo{i:03d}.png")
            writer.add_image(
                f"photo{i:03d}",
                f"photo{i:03d}.png",
                SIZE,
                np.array(boxes) / [width, height, width, height],
                classes,
                flags,
                masks=entries,
            )
        split = num_images - num_images // 4
        writer.add_split("train", range(split))
        writer.add_split("validation", range(split, num_images))
    return directory


def write_boxes(path: Path, dataset: Dataset, images) -> Path:
    """A detections table with the boxes of `images`, thin ones, and one photo without any."""
    with DetectionsWriter(path, {"model": "boxes", "split": "validation"}) as writer:
        for place, image in enumerate(images):
            boxes, classes, _ = dataset.image_boxes(image)
            labels = [dataset.class_labels[c] for c in classes]
            if place == 0:
                boxes, labels = np.zeros((0, 4)), []
            elif place == 1:
                thin = [[0.5, 0.2, 0.5003, 0.6], [0.3, 0.3, 0.3, 0.5]]
                boxes, labels = np.concatenate([boxes, thin]), labels + ["disc", "bar"]
            scores = np.linspace(0.9, 0.1, len(boxes))
            writer.add(dataset.image_id(image), labels, scores, boxes)
    return path


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """A tiny HRNet on 32x32 crops; `arg` is the number of steps (default 30)."""
    config = hrnet_w48_112.get_config()
    config.name = "tiny_masks"
    config.data.update(batch_size=4, group_steps=2, num_threads=2)
    config.data.crop.fixed = (32, 32)
    config.data.canvases = ((32, 32),)
    config.model.update(backbone="hrnet_w18", dtype="float32", class_specific=True)
    # Stages 3 and 4 are their transitions alone: little to compile.
    config.model.layout = dict(width=4, modules=(1, 0, 0), blocks=1)
    config.optimizer.update(learning_rate=0.04, num_steps=int(arg or 30), clip_norm=5.0)
    config.checkpoint.every_steps = 5
    config.evaluation.batch_size = 4
    config.test.update(fixed=(32, 32), canvases=((32, 32),))
    config.log.every_steps = 1
    return config
