"""Speed and memory of the OpenImages metric at the size of the challenge's validation set.

    python -m scripts.bench.bench_openimages_metric [--images=41620] [--detections=300]

Generates a dataset directory and a detections table (not counted), then scores the table in a
process of its own: reading, checking, matching and ranking. Prints seconds, peak memory of that
process, and how many times faster it is than the same algorithm in plain Python (`tests/oracles`)
per image, measured in this run on a few of the images.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.commands import run_main
from common.metrics.coverage import selected_chunks
from common.metrics.openimages import MEAN_AP, evaluate_openimages
from common.tables import DetectionsReader, DetectionsWriter

BOXES, LABELS = 7, 12  # per image; the challenge's validation set has 5.4 boxes, 10 labels


def generate(folder: Path, rng: np.random.Generator) -> None:
    """Writes folder/set and folder/detections.parquet."""
    classes = [f"/m/{index:04d}" for index in range(flags.FLAGS.classes)]
    parents = flags.FLAGS.classes // 10
    hierarchy = {
        "LabelName": "/m/root",
        "Subcategory": [
            {
                "LabelName": classes[parent],
                "Subcategory": [{"LabelName": c} for c in classes[parent + parents :: parents]],
            }
            for parent in range(parents)
        ],
    }
    names = np.array(classes)
    popularity = 1 / np.arange(1, flags.FLAGS.classes + 1)
    popularity = rng.permutation(popularity / popularity.sum())
    with (
        DatasetWriter(folder / "set", "bench", classes, classes, hierarchy) as dataset,
        DetectionsWriter(folder / "detections.parquet", {"model": "generated"}) as table,
    ):
        for number in range(flags.FLAGS.images):
            image_id = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
            boxes = random_boxes(rng, BOXES)
            labels = rng.choice(flags.FLAGS.classes, BOXES, p=popularity)
            flags_ = np.where(rng.random(BOXES) < 0.1, GROUP_OF, 0)
            verified = np.unique([*labels, *rng.choice(flags.FLAGS.classes, LABELS - BOXES)])
            confidence = np.isin(verified, labels)
            dataset.add_image(
                image_id,
                f"{image_id}.jpg",
                (768, 1024),
                boxes,
                labels,
                flags_,
                verified,
                confidence,
            )
            near = rng.integers(BOXES, size=flags.FLAGS.detections)
            found = boxes[near] + rng.normal(0, 0.04, (flags.FLAGS.detections, 4))
            found = np.clip(found, 0, 1)
            found = np.concatenate(
                [
                    np.minimum(found[:, :2], found[:, 2:]),
                    np.maximum(found[:, :2], found[:, 2:]) + 1e-5,
                ],
                axis=1,
            )
            judged = rng.random(flags.FLAGS.detections) < flags.FLAGS.verified
            any_verified = verified[rng.integers(len(verified), size=flags.FLAGS.detections)]
            right = rng.random(flags.FLAGS.detections) < 0.5
            found_labels = np.where(right, labels[near], any_verified)
            other = rng.integers(flags.FLAGS.classes, size=flags.FLAGS.detections)
            found_labels = np.where(judged, found_labels, other)
            table.add(image_id, names[found_labels], rng.random(flags.FLAGS.detections), found)
        dataset.add_split("validation", np.arange(flags.FLAGS.images))


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = np.sort(rng.random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


def score(folder: Path) -> float:
    """Scores the generated table, prints seconds and peak memory."""
    start = time.perf_counter()
    dataset = Dataset.open(folder / "set")
    result = evaluate_openimages(dataset, "validation", folder / "detections.parquet")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = DetectionsReader(folder / "detections.parquet").num_rows
    print(
        f"{dataset.num_images} images, {rows} detections, {dataset.num_classes} classes: "
        f"{seconds:.1f} s, peak memory {peak:.2f} GiB, mAP {result[MEAN_AP.format(0.5)]:.4f}",
        flush=True,
    )
    return seconds


def score_with_twin(folder: Path) -> float:
    """Seconds per image of the plain-Python twin; checks that it agrees."""
    from tests.oracles import openimages as oracle

    dataset = Dataset.open(folder / "set")
    reader = DetectionsReader(folder / "detections.parquet")
    names = dataset.class_labels
    indices = dataset.find_images(reader.image_ids[: flags.FLAGS.twin_images])
    selected = np.arange(len(reader.image_ids)) < flags.FLAGS.twin_images
    images = {}
    for image_id, index in zip(reader.image_ids, indices, strict=False):
        boxes = zip(*(a.tolist() for a in dataset.image_boxes(index)), strict=True)
        labels = zip(*(a.tolist() for a in dataset.image_labels(index)), strict=True)
        images[image_id] = {
            "boxes": [(names[c], tuple(box), bool(flag & GROUP_OF)) for box, c, flag in boxes],
            "labels": [(names[c], confidence) for c, confidence in labels],
            "detections": [],
        }
    for chunk in selected_chunks(reader, names, selected):
        for image, label, value, box in zip(
            chunk.image_index.tolist(),
            chunk.label_index.tolist(),
            chunk.scores.tolist(),
            chunk.boxes.tolist(),
            strict=True,
        ):
            images[reader.image_ids[image]]["detections"].append((names[label], value, tuple(box)))
    start = time.perf_counter()
    mean, _ = oracle.evaluate(images, names, dataset.hierarchy)
    seconds = (time.perf_counter() - start) / len(images)
    subset = folder / "subset.parquet"
    with DetectionsWriter(subset, {}) as table:
        for image_id, image in images.items():
            rows = zip(*image["detections"], strict=True)
            table.add(image_id, *rows)
    result = evaluate_openimages(
        dataset, "validation", subset, allow_partial=True, say=lambda _: None
    )
    difference = abs(result[MEAN_AP.format(0.5)] - mean)
    print(
        f"twin on {len(images)} images: {seconds * 1e3:.1f} ms each, mAP differs by {difference:g}"
    )
    return seconds


def define_flags() -> None:
    flags.DEFINE_integer("images", 41_620, "Images of the split.")
    flags.DEFINE_integer("detections", 300, "Detections per image.")
    flags.DEFINE_integer("classes", 500, "Classes, a tenth of them parents of ten each.")
    flags.DEFINE_float(
        "verified", 0.7, "Share of the detections that fall on verified classes and are matched."
    )
    flags.DEFINE_integer("twin_images", 400, "Images for the plain-Python twin; 0: none.")
    flags.DEFINE_string("only", None, "Folder with generated data: score it and stop.")


def main():
    if flags.FLAGS.only:
        score(Path(flags.FLAGS.only))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        generate(folder, np.random.default_rng(0))
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "scripts.bench.bench_openimages_metric", f"--only={name}"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        print(f"whole process with imports: {seconds:.1f} s")
        if flags.FLAGS.twin_images:
            twin = score_with_twin(folder) * flags.FLAGS.images
            print(f"ratio twin / vectorised, for all images: {twin / seconds:.0f}x")


if __name__ == "__main__":
    define_flags()
    run_main(main)
