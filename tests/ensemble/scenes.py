"""A small data set with three tables, and the evaluator's figures of merged rows.

Shape legend: n rows.
"""

import dataclasses

import numpy as np

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.settings import read_settings
from common.metrics import openimages
from common.tables import Detections, DetectionsWriter, read_detections
from configs.ensemble import auto
from ensemble import search
from ensemble.operators.groups import Rows
from ensemble.preparation import open_prepared
from ensemble.settings import EnsembleSettings
from ensemble.tree import scoring

LABELS = ["/m/a", "/m/b", "/m/c", "/m/d"]
HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/b"}]},
        {"LabelName": "/m/c"},
        {"LabelName": "/m/d"},
    ],
}
MODELS = ["one", "two", "three"]
SETTINGS = read_settings(EnsembleSettings, auto.get_config())


def make_scene(folder):
    """A dataset with two splits and three tables: one finds half of it, two places boxes badly."""
    rng = np.random.default_rng(0)
    found: dict[str, dict] = {model: {} for model in MODELS}
    with DatasetWriter(folder / "set", "test", LABELS, LABELS, HIERARCHY, "") as writer:
        rows = []
        for number in range(60):
            image_id = f"i{number * 37 % 60:02d}"
            count = rng.integers(0, 4)
            corner = rng.integers(0, 5, (count, 2)) / 8
            boxes = np.concatenate([corner, corner + rng.integers(2, 4, (count, 2)) / 8], axis=1)
            classes = rng.integers(0, len(LABELS), count)
            flags = np.where(rng.random(count) < 0.2, GROUP_OF, 0)
            verified = rng.permutation(len(LABELS))[:2]
            rows.append(
                writer.add_image(
                    image_id, "x.jpg", (8, 8), boxes, classes, flags, verified, verified % 2
                )
            )
            for place, model in enumerate(MODELS):
                found[model][image_id] = detect(rng, place, boxes, classes)
        writer.add_split("tune", rows[:40])
        writer.add_split("report", rows[40:])
        writer.add_split("mixed", rows[30:])
    for model, images in found.items():
        with DetectionsWriter(folder / f"{model}.parquet", {"model": model}) as writer:
            for image_id, detections in images.items():
                writer.add(image_id, *detections)
    return folder


def detect(rng, place, boxes, classes):
    chosen = rng.random(len(boxes)) < (0.5, 0.9, 0.7)[place]
    near = boxes[chosen] + rng.normal(0, (0.01, 0.05, 0.02)[place], (chosen.sum(), 4))
    near = np.concatenate([near, near[: len(near) // 2] + 0.01])
    labels = np.concatenate([classes[chosen], classes[chosen][: len(near) - chosen.sum()]])
    corner = rng.random((3, 2)) * 0.6
    boxes = np.concatenate([near, np.concatenate([corner, corner + 0.3], axis=1)]).clip(0, 1)
    boxes[-1, 2] = boxes[-1, 0]  # without area
    labels = np.concatenate([labels, rng.integers(0, len(LABELS), 3)])
    # Few scores, so that ties are common.
    scores = np.concatenate([rng.integers(3, 9, len(near)) / 10, rng.integers(1, 6, 3) / 10])
    return [LABELS[label] for label in labels], scores.astype(np.float32), boxes


def paths(folder):
    return [str(folder / f"{model}.parquet") for model in MODELS]


def open_all(folder, splits=("tune",), **options):
    dataset = Dataset.open(folder / "set")
    tables, preparation = open_prepared(paths(folder), SETTINGS, dataset)
    options = {"say": lambda text: None, **options}
    return dataset, scoring.build_scorers(dataset, splits, tables, preparation, **options)


def all_rows(folder):
    """Rows of each table with group = image * K + class, and the table itself."""
    found = [read_detections(path, LABELS) for path in paths(folder)]
    rows = [
        Rows(
            d.image_index.astype(np.int64) * len(LABELS) + d.label_index,
            d.scores,
            d.boxes,
            np.zeros(len(d), np.int32),
        )
        for d in found
    ]
    return rows, found[0]


def evaluate(dataset, like: Detections, rows: Rows, split: str, **options):
    """Metric of merged rows by the evaluator."""
    image, label = rows.group // len(LABELS), rows.group % len(LABELS)
    order = np.lexsort((np.arange(len(rows)), -rows.scores, image))
    merged = dataclasses.replace(
        like,
        image_index=image[order].astype(np.int32),
        label_index=label[order].astype(np.int32),
        scores=rows.scores[order],
        boxes=rows.boxes[order],
    )
    return openimages.evaluate_openimages(dataset, split, merged, say=lambda text: None, **options)


def small_config(arg=None, **trees_of_stages):
    config = auto.get_config(arg)
    config.search.trees = trees_of_stages or dict(topology=4, operators=12, joint=0)
    config.search.population = 4
    # Adj-NMS alone: fewer kernels to compile.
    config.search.space.nms = ("nms", "adj")
    return config


def run(folder, output, config, lines=None, report="report"):
    return search.search_tables(
        paths(folder),
        config,
        Dataset.open(folder / "set"),
        "tune",
        report,
        output,
        say=(lines if lines is not None else []).append,
    )
