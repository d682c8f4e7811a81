"""Datasets of a few small photos, and training batches of them."""

import numpy as np
from PIL import Image

from common.data import input as inputs
from common.data.dataset import Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from tests.common.data.factories import data_settings

SIZE = 64
# One level below: Animal > Dog > Puppy, Animal > Cat; Tree.
LABELS = ["Animal", "Dog", "Puppy", "Cat", "Tree"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {
            "LabelName": "Animal",
            "Subcategory": [
                {"LabelName": "Dog", "Subcategory": [{"LabelName": "Puppy"}]},
                {"LabelName": "Cat"},
            ],
        },
        {"LabelName": "Tree"},
    ],
}


def write(folder, name, photos, labels=LABELS, hierarchy=HIERARCHY, size=SIZE) -> Dataset:
    """`photos`: for each keyword arguments of `DatasetWriter.add_image` after the size."""
    folder.mkdir(exist_ok=True)
    extra = {"has_ignore": True} if any("ignore" in photo for photo in photos) else {}
    with DatasetWriter(
        folder / name, name, labels, labels, hierarchy, str(folder), **extra
    ) as writer:
        for i, photo in enumerate(photos):
            pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            writer.add_image(f"{name}{i}", f"{name}{i}.png", (size, size), **photo)
        writer.add_split("train", range(len(photos)))
    return Dataset.open(folder / name)


def read(dataset, num_steps=1, start_step=0, **changes):
    settings = data_settings(**{"flip": False, "scale_jitter": (1.0, 1.0)} | changes)
    plan = train_plan(dataset, settings, 3)
    return list(
        inputs.train_batches(
            dataset, plan, settings, seed=5, num_steps=num_steps, start_step=start_step
        )
    )


def boxes_of(batch, slot, kind):
    valid = batch[f"{kind}_valid"][slot]
    return sorted(tuple(box) for box in (batch[f"{kind}_boxes"][slot][valid] / SIZE).tolist())


NO_BOXES = {"boxes": np.zeros((0, 4)), "classes": []}
BOXES = np.array([[0, 0, 0.25, 0.25], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 0.75, 1]])
