"""Random data like OpenImages': what the benches share when they generate data sets and tables."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def image_id(number: int) -> str:
    """16 hexadecimal digits, scattered, as OpenImages has."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def class_labels(count: int) -> list[str]:
    return [f"/m/{index:04d}" for index in range(count)]


def two_levels(labels: Sequence[str], parents: int) -> dict[str, Any]:
    """Hierarchy whose first `parents` classes have all others as children, equally many each."""
    children = [labels[parents + parent :: parents] for parent in range(parents)]
    return {
        "LabelName": "/m/root",
        "Subcategory": [
            {"LabelName": label, "Subcategory": [{"LabelName": child} for child in below]}
            for label, below in zip(labels, children, strict=False)
        ],
    }


def rank_frequencies(rng: np.random.Generator, classes: int) -> Float[np.ndarray, " K"]:
    """Shares of the classes: 1 / rank, in random order."""
    shares = rng.permutation(1 / np.arange(1, classes + 1))
    return shares / shares.sum()


def random_boxes(
    rng: np.random.Generator, count: int, least: float = 0.05, largest: float = 0.3
) -> Float[np.ndarray, "n 4"]:
    """Normalised corners of boxes anywhere, with sides from `least` to `largest`."""
    corner = rng.random((count, 2)) * (1 - largest)
    return np.concatenate([corner, corner + rng.uniform(least, largest, (count, 2))], axis=1)


def clip_boxes(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Moved boxes within the image, with sides above zero."""
    boxes = np.clip(boxes, 0, 1)
    low = np.minimum(boxes[:, :2], boxes[:, 2:])
    return np.concatenate([low, np.maximum(boxes[:, 2:], low + 1e-5)], axis=1)


def generated_index(num_images: int, num_boxes: int, num_classes: int) -> Any:
    """What a plan reads of a dataset, with class frequencies like 1 / rank and a quarter of the
    photos in portrait format."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(num_boxes, np.full(num_images, 1 / num_images))
    weights = 1 / np.arange(1, num_classes + 1)
    corners = rng.random((num_boxes, 2), np.float32)
    sides = (1 - corners) * rng.beta(0.8, 2.0, (num_boxes, 2)).astype(np.float32)
    classes = rng.choice(num_classes, num_boxes, p=weights / weights.sum()).astype(np.int32)
    return types.SimpleNamespace(
        directory="generated",
        num_classes=num_classes,
        class_labels=[str(number) for number in range(num_classes)],
        split=lambda name: np.arange(num_images),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.concatenate([corners, corners + sides], axis=1),
        box_classes=classes,
        box_flags=np.zeros(num_boxes, np.uint8),
        image_sizes=np.where(rng.random((num_images, 1)) < 0.25, (1024, 768), (768, 1024)),
    )
