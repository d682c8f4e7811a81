"""Speed and memory of the OpenImages instance-segmentation metric.

    python -m scripts.bench.bench_mask_metric [--images=10000] [--detections=100]

Generates a dataset whose truth lies in PNG files of another resolution than the photos, and a
detections table with masks at the size of the photos (not counted), then scores the table with
--expand_predictions in a process of its own: reading, checking, matching and ranking. Prints
seconds, CPU seconds and peak memory of that process.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.commands import run_main
from common.masks import rle
from common.metrics.openimages_masks import MEAN_AP, evaluate_openimages_masks
from common.tables import DetectionsWriter
from scripts.bench.bench_rle import random_blobs

PHOTO, TRUTH = (768, 1024), (600, 800)  # height, width of photos and of the truth's masks
SHAPES, VARIANTS = 400, 5  # different objects, and different detections of each
OBJECTS, WITHOUT_MASK, LABELS = 5, 2, 12  # per image


def generate(folder: Path, rng: np.random.Generator) -> None:
    """Writes folder/set and folder/detections.parquet."""
    classes = [f"/m/{index:04d}" for index in range(flags.FLAGS.classes)]
    parents = flags.FLAGS.classes // 12  # 25 of the challenge's 300
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
    shapes = random_blobs(rng, SHAPES, TRUTH)
    counts, boxes = [], rle.tight_boxes(rle.encode(shapes), [TRUTH] * SHAPES)
    (folder / "masks").mkdir()
    for number, shape in enumerate(shapes):
        Image.fromarray(shape).save(folder / "masks" / f"{number}.png")
        photo = Image.fromarray(shape)
        for _ in range(VARIANTS):
            # Shifted by up to a few per cent of the photo.
            shift = (*(1, 0), rng.normal(0, 12), *(0, 1), rng.normal(0, 12))
            moved = photo.transform(TRUTH[::-1], Image.Transform.AFFINE, shift)
            counts += rle.encode([np.asarray(moved.resize(PHOTO[::-1], Image.Resampling.NEAREST))])
    boxes = boxes / np.array([TRUTH[1], TRUTH[0]] * 2)
    masks = np.array([*counts, None], object)[:-1]
    tight = rle.tight_boxes(counts, [PHOTO] * len(counts)) / np.array([PHOTO[1], PHOTO[0]] * 2)
    size = np.tile(np.int32(PHOTO), (flags.FLAGS.detections, 1))
    with (
        DatasetWriter(
            folder / "set",
            "bench",
            classes,
            classes,
            hierarchy,
            has_masks=True,
            extra={"mask_root": str(folder / "masks")},
        ) as dataset,
        DetectionsWriter(
            folder / "detections.parquet", {"model": "generated"}, masks=True
        ) as table,
    ):
        for number in range(flags.FLAGS.images):
            image_id = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
            objects = rng.integers(SHAPES, size=OBJECTS + WITHOUT_MASK)
            labels = rng.integers(flags.FLAGS.classes, size=len(objects))
            entries = [{"png": f"{shape}.png"} for shape in objects[:OBJECTS].tolist()]
            bits = np.zeros(len(objects), np.uint8)
            bits[-1] = GROUP_OF * (rng.random() < 0.3)
            verified = np.unique([*labels, *rng.integers(flags.FLAGS.classes, size=LABELS)])
            dataset.add_image(
                image_id,
                f"{image_id}.jpg",
                PHOTO,
                boxes[objects],
                labels,
                bits,
                verified,
                np.isin(verified, labels),
                masks=entries + [None] * WITHOUT_MASK,
            )
            near = rng.integers(len(objects), size=flags.FLAGS.detections)
            right = rng.random(flags.FLAGS.detections) < 0.5
            shape = np.where(right, objects[near], rng.integers(SHAPES, size=len(near)))
            found = shape * VARIANTS + rng.integers(VARIANTS, size=len(near))
            judged = rng.random(flags.FLAGS.detections) < flags.FLAGS.verified
            other = rng.integers(flags.FLAGS.classes, size=len(near))
            found_labels = np.where(judged, labels[near], other)
            scores = rng.random(flags.FLAGS.detections)
            table.add(image_id, names[found_labels], scores, tight[found], masks[found], size)
        dataset.add_split("validation", np.arange(flags.FLAGS.images))


def score(folder: Path) -> None:
    """Scores the generated table, prints seconds and peak memory."""
    start = time.perf_counter()
    dataset = Dataset.open(folder / "set")
    result = evaluate_openimages_masks(
        dataset, "validation", folder / "detections.parquet", expand_predictions=True
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{dataset.num_images} images x {flags.FLAGS.detections} masks, {len(dataset.boxes)} "
        f"objects: {seconds:.1f} s (CPU {time.process_time():.1f} s), peak memory {peak:.2f} GiB, "
        f"mAP {result[MEAN_AP.format(0.5)]:.4f}",
        flush=True,
    )


def define_flags() -> None:
    flags.DEFINE_integer("images", 10_000, "Images of the split.")
    flags.DEFINE_integer("detections", 100, "Detections per image.")
    flags.DEFINE_integer("classes", 300, "Classes, a twelfth of them parents of eleven each.")
    flags.DEFINE_float("verified", 0.7, "Share of the detections of classes in the image.")
    flags.DEFINE_string("only", None, "Folder with generated data: score it and stop.")


def main():
    if flags.FLAGS.only:
        score(Path(flags.FLAGS.only))
        return
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        generate(Path(name), np.random.default_rng(0))
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "scripts.bench.bench_mask_metric", f"--only={name}"]
        subprocess.run([*command, f"--detections={flags.FLAGS.detections}"], check=True)
        print(f"whole process with imports: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    define_flags()
    run_main(main)
