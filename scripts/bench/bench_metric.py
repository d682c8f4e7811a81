"""Speed and memory of the OpenImages metrics at the size of the challenge's validation set.

    python -m scripts.bench.bench_metric
    python -m scripts.bench.bench_metric --masks --images=10000 --detections=100 --classes=300

Generates a dataset directory and a detections table (not counted), then scores the table in a
process of its own: reading, checking, matching and ranking. Prints the seconds and the peak memory
of that process. Of boxes, it also scores some images with the plain-Python twin (`tests/oracles`),
checks that both agree and prints how many times faster ours is.

With --masks the truth lies in PNG files of another resolution than the photos, the table's masks
have the size of the photos, and detections are copied to parent classes while they are scored.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.commands import run_main
from common.masks import rle
from common.metrics import openimages, openimages_masks
from common.metrics.coverage import selected_chunks
from common.tables import DetectionsReader, DetectionsWriter
from scripts.bench import generated
from scripts.bench.bench_rle import random_blobs
from scripts.bench.timing import peak_mib, run_alone

OBJECTS, LABELS = 7, 12  # per image; the challenge's validation set has 5.4 boxes, 10 labels
WITHOUT_MASK = 2  # of the objects
PHOTO, TRUTH = (768, 1024), (600, 800)  # height, width of photos and of the truth's masks
SHAPES, VARIANTS = 400, 5  # different masks of the truth, and different detections of each


class Boxes:
    """Objects with boxes, and detections near them."""

    options: dict[str, Any] = {}

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Boxes and flags of an image's objects, and what else `add_image` takes."""
        self._boxes = generated.random_boxes(rng, OBJECTS)
        return self._boxes, np.where(rng.random(OBJECTS) < 0.1, GROUP_OF, 0), {}

    def detect(self, rng: np.random.Generator, near: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `DetectionsWriter.add` takes after scores, for detections of the objects `near`."""
        return (generated.clip_boxes(self._boxes[near] + rng.normal(0, 0.04, (len(near), 4))),)


class Masks:
    """Objects with masks, some of a stock of shapes, and detections that are shifted copies."""

    def __init__(self, folder: Path, rng: np.random.Generator):
        shapes = random_blobs(rng, SHAPES, TRUTH)
        boxes = rle.tight_boxes(rle.encode(shapes), np.tile(TRUTH, (SHAPES, 1)))
        self._truth = boxes / np.array([TRUTH[1], TRUTH[0]] * 2)
        counts: list[bytes] = []
        for number, shape in enumerate(shapes):
            photo = Image.fromarray(shape)
            photo.save(folder / f"{number}.png")
            for _ in range(VARIANTS):
                shift = (1, 0, rng.normal(0, 12), 0, 1, rng.normal(0, 12))
                moved = photo.transform(TRUTH[::-1], Image.Transform.AFFINE, shift)
                sized = moved.resize(PHOTO[::-1], Image.Resampling.NEAREST)
                counts += rle.encode(np.asarray(sized)[None])
        self._masks = np.array([*counts, None], object)[:-1]
        tight = rle.tight_boxes(counts, np.tile(PHOTO, (len(counts), 1)))
        self._tight = tight / np.array([PHOTO[1], PHOTO[0]] * 2)
        self.options = {"has_masks": True, "extra": {"mask_root": str(folder)}}

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        self._shapes = rng.integers(SHAPES, size=OBJECTS)
        entries = [{"png": f"{shape}.png"} for shape in self._shapes[WITHOUT_MASK:].tolist()]
        bits = np.zeros(OBJECTS, np.uint8)
        bits[0] = GROUP_OF * (rng.random() < 0.3)
        return self._truth[self._shapes], bits, {"masks": [None] * WITHOUT_MASK + entries}

    def detect(self, rng: np.random.Generator, near: np.ndarray) -> tuple[np.ndarray, ...]:
        right = rng.random(len(near)) < 0.5
        shape = np.where(right, self._shapes[near], rng.integers(SHAPES, size=len(near)))
        chosen = shape * VARIANTS + rng.integers(VARIANTS, size=len(near))
        return (
            self._tight[chosen],
            self._masks[chosen],
            np.tile(np.asarray(PHOTO, np.int32), (len(near), 1)),
        )


def generate(folder: Path, masks: bool) -> None:
    """Writes folder/set and folder/detections.parquet."""
    rng, count, classes = np.random.default_rng(0), flags.FLAGS.detections, flags.FLAGS.classes
    (folder / "masks").mkdir()
    objects = Masks(folder / "masks", rng) if masks else Boxes()
    labels = generated.class_labels(classes)
    hierarchy = generated.two_levels(labels, classes // 10)
    names, frequencies = np.array(labels), generated.rank_frequencies(rng, classes)
    with (
        DatasetWriter(
            folder / "set", "bench", labels, labels, hierarchy, **objects.options
        ) as dataset,
        DetectionsWriter(folder / "detections.parquet", {"model": "x"}, masks=masks) as table,
    ):
        for number in range(flags.FLAGS.images):
            image_id = generated.image_id(number)
            boxes, bits, others = objects.draw(rng)
            truth = rng.choice(classes, OBJECTS, p=frequencies)
            verified = np.unique([*truth, *rng.choice(classes, LABELS - OBJECTS)])
            dataset.add_image(
                image_id,
                f"{image_id}.jpg",
                PHOTO,
                boxes,
                truth.tolist(),
                bits.tolist(),
                verified.tolist(),
                np.isin(verified, truth).tolist(),
                **others,
            )
            near = rng.integers(OBJECTS, size=count)
            right = rng.random(count) < 0.5
            detected = np.where(right, truth[near], rng.choice(verified, count))
            judged = rng.random(count) < flags.FLAGS.verified
            detected = np.where(judged, detected, rng.integers(classes, size=count))
            shapes: tuple[Any, ...] = objects.detect(rng, near)
            table.add(image_id, names[detected], rng.random(count), *shapes)
        dataset.add_split("validation", range(flags.FLAGS.images))


def score(folder: Path, masks: bool) -> float:
    """Scores the generated table, prints seconds and peak memory; returns the seconds."""
    start = time.perf_counter()
    dataset, table = Dataset.open(folder / "set"), folder / "detections.parquet"
    if masks:
        figures = openimages_masks.evaluate_openimages_masks(
            dataset, "validation", table, expand_predictions=True
        )
    else:
        figures = openimages.evaluate_openimages(dataset, "validation", table)
    seconds = time.perf_counter() - start
    print(
        f"{dataset.num_images} images, {DetectionsReader(table).num_rows} detections, "
        f"{dataset.num_classes} classes: {seconds:.1f} s (CPU {time.process_time():.1f} s), "
        f"peak memory {peak_mib() / 1024:.2f} GiB, mAP {next(iter(figures.values())):.4f}",
        flush=True,
    )
    return seconds


def score_with_twin(folder: Path) -> float:
    """Seconds per image of the plain-Python twin; checks that it agrees."""
    from tests.oracles import openimages as oracle

    dataset, reader = Dataset.open(folder / "set"), DetectionsReader(folder / "detections.parquet")
    names, ids = dataset.class_labels, reader.image_ids[: flags.FLAGS.twin_images]
    images: dict[str, dict[str, Any]] = {}
    for image_id, index in zip(ids, dataset.find_images(ids), strict=True):
        boxes = zip(*(a.tolist() for a in dataset.image_boxes(index)), strict=True)
        labels = zip(*(a.tolist() for a in dataset.image_labels(index)), strict=True)
        images[image_id] = {
            "boxes": [(names[c], tuple(box), bool(flag & GROUP_OF)) for box, c, flag in boxes],
            "labels": [(names[c], confidence) for c, confidence in labels],
            "detections": [],
        }
    for chunk in selected_chunks(reader, names, np.arange(len(reader.image_ids)) < len(ids)):
        columns = (chunk.image_index, chunk.label_index, chunk.scores, chunk.boxes)
        for image, label, value, box in zip(*(c.tolist() for c in columns), strict=True):
            images[ids[image]]["detections"].append((names[label], value, tuple(box)))
    start = time.perf_counter()
    mean, _ = oracle.evaluate(images, names, dataset.hierarchy)
    seconds = (time.perf_counter() - start) / len(images)
    subset = folder / "subset.parquet"
    with DetectionsWriter(subset, {}) as table:
        for image_id, image in images.items():
            names_of, scores, places = zip(*image["detections"], strict=True)
            table.add(image_id, names_of, np.array(scores), np.array(places))
    figures = openimages.evaluate_openimages(
        dataset, "validation", subset, allow_partial=True, say=lambda _: None
    )
    difference = abs(next(iter(figures.values())) - mean)
    print(f"twin on {len(ids)} images: {seconds * 1e3:.1f} ms each, mAP differs by {difference:g}")
    return seconds


def define_flags() -> None:
    flags.DEFINE_bool("masks", False, "The metric of masks.")
    flags.DEFINE_integer("images", 41_620, "Images of the split.")
    flags.DEFINE_integer("detections", 300, "Detections per image.")
    flags.DEFINE_integer("classes", 500, "Classes, a tenth of them parents of nine each.")
    flags.DEFINE_float("verified", 0.7, "Share of the detections of classes verified there.")
    flags.DEFINE_integer("twin_images", 400, "Images for the plain-Python twin; 0: none.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, masks = Path(name), flags.FLAGS.masks
        start = time.perf_counter()
        generate(folder, masks)
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        seconds = run_alone(score, folder, masks)
        if flags.FLAGS.twin_images and not masks:
            twin = score_with_twin(folder) * flags.FLAGS.images
            print(f"ratio twin / ours, for all images: {twin / seconds:.0f}x")


if __name__ == "__main__":
    define_flags()
    run_main(main)
