"""Photos whose colours tell the place: red is x, green is y, both as shares of the photo.

So a crop tells by itself which part of the photo it shows. Each box holds an ellipse, its mask.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.settings import read_settings
from common.masks import rle
from segmentation.crops.settings import DataSettings
from segmentation.crops.windows import CropSize

LABELS = ["a", "b", "c"]
SIZES = ((60, 90), (90, 60), (64, 64), (40, 120), (100, 80))  # height, width
NUM_PHOTOS = 10


def photo(size: tuple[int, int]) -> np.ndarray:
    y, x = (np.arange(side) + 0.5 for side in size)
    pixels = np.zeros((*size, 3))
    pixels[..., 0], pixels[..., 1] = 255 * x / size[1], 255 * y[:, None] / size[0]
    return np.round(pixels).astype(np.uint8)


def in_ellipse(box: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether normalised points lie in the ellipse of a normalised box."""
    (x0, y0, x1, y1) = box
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 < 1


def write_dataset(directory: Path) -> Dataset:
    """Photo i has i % 4 + 1 instances with masks (PNG, run lengths and polygons in turn), a box
    without and a group-of box; class c has long boxes, a and b have not."""
    rng = np.random.default_rng(0)
    photos = directory / "photos"
    photos.mkdir(parents=True)
    with DatasetWriter(
        directory / "set", "set", LABELS, LABELS, None, str(photos), has_masks=True
    ) as writer:
        for i in range(NUM_PHOTOS):
            size = SIZES[i % len(SIZES)]
            name = f"{i}.png" if i % 2 else f"{i}.jpg"
            Image.fromarray(photo(size)).save(photos / name, quality=98, subsampling=0)
            boxes, classes, masks = [], [], []
            for number in range(i % 4 + 1):
                class_ = int(rng.integers(3))
                sides = (0.1, 0.85) if class_ == 2 else rng.uniform(0.2, 0.6, 2)
                corner = rng.uniform(0, 1 - np.array(sides))
                box = np.concatenate([corner, corner + sides]).astype(np.float32)
                boxes.append(box)
                classes.append(class_)
                masks.append(_mask(photos, f"{i}_{number}", box, size, kind=number % 3))
            boxes += [np.array([0.1, 0.1, 0.5, 0.5]), np.array([0.2, 0.2, 0.9, 0.9])]
            flags = [0] * (len(boxes) - 1) + [GROUP_OF]
            masks += [None, masks[0]]
            writer.add_image(
                f"p{i}", name, size, np.array(boxes), [*classes, 0, 1], flags, masks=masks
            )
        writer.add_split("train", range(NUM_PHOTOS))
        writer.add_split("some", [7, 2, 4])
        writer.add_split("none", [])
    return Dataset.open(directory / "set")


def _mask(photos: Path, name: str, box: np.ndarray, size: tuple[int, int], kind: int):
    height, width = (2 * side for side in size)
    y, x = np.mgrid[:height, :width] + 0.5
    mask = in_ellipse(box, x / width, y / height)
    if kind == 0:
        Image.fromarray(mask).save(photos / f"{name}.png")
        return {"png": str(photos / f"{name}.png")}
    if kind == 1:
        return {"size": [height, width], "counts": rle.encode([mask])[0].decode()}
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    centre, radius = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    points = (centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1)) * size[::-1]
    return json.loads(json.dumps([points.ravel().tolist()]))


def config(**changes) -> DataSettings:
    """`config.data`: short side 24 to 36, long 72."""
    fields = {
        "dir": "",
        "train_split": "train",
        "eval_split": "train",
        "sampler": "uniform",
        "max_instances": 0,
        "batch_size": 4,
        "crop": {"short": (24, 36), "long": 72, "fixed": None},
        "canvases": ((40, 40), (40, 72), (72, 40)),
        "group_steps": 3,
        "jitter": 0.1,
        "rotate": True,
        "flip": True,
        "proposals": "",
        "proposal_share": 0.5,
        "on_image_error": "fatal",
        "num_processes": 1,
        "num_threads": 2,
        "prefetch": 1,
    }
    return read_settings(DataSettings, fields | changes, "config.data")


def size(**fields) -> CropSize:
    """`config.data.crop`; what is not given is None."""
    whole = {"short": None, "long": None, "fixed": None} | fields
    return read_settings(CropSize, whole, "config.data.crop")
