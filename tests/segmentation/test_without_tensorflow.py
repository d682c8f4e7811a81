"""Crops of JPEG files are the same, bit for bit, whether TensorFlow or Pillow decodes them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import tensorflow_io
from common.data.dataset import Dataset, DatasetWriter
from common.masks import rle
from segmentation.crops import batches as inputs
from segmentation.crops.plan import make_plan
from tests.segmentation import coded_photos as coded

NUM_PHOTOS = 16


def write_dataset(directory: Path) -> Dataset:
    """Noisy JPEGs of several makes, grey ones among them, with boxes much smaller than they."""
    rng = np.random.default_rng(0)
    with DatasetWriter(
        directory / "set", "set", ["a"], ["a"], None, str(directory), has_masks=True
    ) as writer:
        for i in range(NUM_PHOTOS):
            size = tuple(int(side) for side in rng.integers(150, 420, 2))
            pixels = rng.integers(0, 256, size if i % 4 == 0 else (*size, 3)).astype(np.uint8)
            tags = Image.Exif()
            tags[0x0112] = 1 + i % 8  # orientation
            Image.fromarray(pixels).save(directory / f"{i}.jpg", exif=tags, subsampling=i % 3)
            corner, sides = rng.uniform(0, 0.5, (3, 2)), rng.uniform(0.05, 0.5, (3, 2))
            boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
            mask = {"size": [8, 8], "counts": rle.encode([np.ones((8, 8), bool)])[0].decode()}
            writer.add_image(f"{i}", f"{i}.jpg", (0, 0), boxes, [0] * 3, masks=[mask] * 3)
        writer.add_split("train", range(NUM_PHOTOS))
    return Dataset.open(directory / "set")


def read_batches(dataset: Dataset) -> list[dict]:
    config = coded.config(batch_size=8, rotate=False)
    plan = make_plan(dataset, config, 5)
    return list(inputs.train_batches(dataset, plan, config, num_steps=8))


def test_batches_are_the_same_without_tensorflow(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason="is compared with Pillow")
    dataset = write_dataset(tmp_path)
    decode, reductions = tensorflow_io.cut_jpeg, []

    def counted(data, reduction, window):
        reductions.append(reduction)
        return decode(data, reduction, window)

    monkeypatch.setattr(tensorflow_io, "cut_jpeg", counted)
    expected = read_batches(dataset)
    assert len(reductions) > 20 and len(set(reductions)) > 1
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it now raises ImportError
    reductions.clear()
    batches = read_batches(dataset)
    assert not reductions and len(batches) == len(expected) == 8
    for batch, other in zip(batches, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
