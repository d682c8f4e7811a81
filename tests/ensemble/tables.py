"""Small detections tables for the tests of merging."""

import numpy as np

from common.tables import DetectionsWriter, read_detections

LABELS = ("ant", "bee", "cow")


def draw_images(seed, count=12, most=9, labels=LABELS):
    """Detections of images: a few objects, each found several times, at slightly other places."""
    rng = np.random.default_rng(seed)
    objects = np.random.default_rng(99).uniform(0, 0.6, (4, 2))
    images = {}
    for number in range(count):
        rows = int(rng.integers(0, most))
        low = objects[rng.integers(0, 4, rows)] + rng.normal(0, 0.02, (rows, 2))
        boxes = np.clip(np.concatenate([low, low + 0.3], axis=1), 0, 1).astype(np.float32)
        scores = rng.uniform(0.05, 0.95, rows).astype(np.float32)
        images[f"i{number:03d}"] = ([labels[c] for c in rng.integers(0, len(labels), rows)],
                                    scores, boxes)  # fmt: skip
    return images


def write(path, images, shards=1, **metadata):
    for shard in range(shards):
        with DetectionsWriter(
            path, {"model": "m", **metadata}, process_index=shard, process_count=shards
        ) as writer:
            for image in list(images)[shard::shards]:
                writer.add(image, *images[image])
    return str(path)


def rows_of(path):
    found = read_detections(path)
    return [
        (found.image_ids[i], found.labels[c], float(score), tuple(box.tolist()))
        for i, c, score, box in zip(
            found.image_index, found.label_index, found.scores, found.boxes, strict=True
        )
    ]
