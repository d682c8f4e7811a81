"""Time and memory of mining category relationships at OpenImages size, and of re-scoring with them.

    python -m scripts.bench.bench_relations --folder=/tmp/relations

Generates (once, 31 s) a dataset directory of 1.74 M images with 12.2 M boxes and 20 M image-level
labels of 500 classes: class frequencies like 1 / rank, few images with very many boxes.
"""

import time
from pathlib import Path

import numpy as np
from absl import flags

from common.data.dataset import Dataset, DatasetWriter
from common.io.commands import run_main
from ensemble.relations.mining import mine_relations
from ensemble.relations.rules import RelationSettings, make_rules, rescore
from scripts.bench import generated
from scripts.bench.timing import peak_mib

_BLOCK = 1 << 16  # images


def define_flags() -> None:
    flags.DEFINE_string("folder", None, "Where the generated dataset is kept.", required=True)
    flags.DEFINE_integer("images", 1_740_000, "Images to generate.")
    flags.DEFINE_integer("classes", 500, "Classes to generate.")
    flags.DEFINE_integer("rows", 1_000_000, "Detections to re-score, 300 an image.")


def generate(directory: Path, num_images: int, num_classes: int) -> None:
    """Writes the dataset: boxes anywhere, classes at random, 100 of them parents of four others."""
    rng = np.random.default_rng(0)
    labels = [f"class{i}" for i in range(num_classes)]
    hierarchy = generated.two_levels(labels, num_classes // 5)
    weights = rng.permutation(1 / (np.arange(num_classes) + 3.0))
    cumulative = np.cumsum(weights / weights.sum())
    with DatasetWriter(directory, "generated", labels, labels, hierarchy) as writer:
        for start in range(0, num_images, _BLOCK):
            count = min(_BLOCK, num_images - start)
            sizes = np.minimum(rng.negative_binomial(0.8, 0.8 / 7.8, count), 700)
            total = int(sizes.sum())
            classes = np.searchsorted(cumulative, rng.random(total)).clip(0, num_classes - 1)
            side = rng.random((total, 2)) ** 2 * 0.9 + 0.01
            low = rng.random((total, 2)) * (1 - side)
            present = np.unique(np.repeat(np.arange(count), sizes) * num_classes + classes)
            tried = np.repeat(np.arange(count), 5) * num_classes
            tried += rng.integers(0, num_classes, 5 * count)
            absent = np.setdiff1d(tried, present)
            keys = np.concatenate([present, absent])
            order = np.argsort(keys)
            keys = keys[order]
            ids = [f"{i:016x}" for i in range(start, start + count)]
            writer.add_images(
                ids,
                ids,
                np.zeros((count, 2), np.int32),
                sizes.tolist(),
                np.concatenate([low, low + side], axis=1).astype(np.float32),
                classes.astype(np.int32),
                np.zeros(total, np.uint8),
                np.bincount(keys // num_classes, minlength=count).tolist(),
                (keys % num_classes).astype(np.int32),
                (np.arange(len(keys)) < len(present)).astype(np.uint8)[order],
            )
        writer.add_split("train", range(num_images))


def main():
    directory = Path(flags.FLAGS.folder)
    if not directory.exists():
        generate(directory, flags.FLAGS.images, flags.FLAGS.classes)
    dataset = Dataset.open(directory)
    before, start = peak_mib(), time.perf_counter()
    relations = mine_relations(dataset, "train")
    seconds = time.perf_counter() - start
    print(
        f"mining {dataset.num_images:,} images, {len(dataset.boxes):,} boxes: {seconds:.1f} s, "
        f"peak memory {peak_mib():.0f} MiB (before {before:.0f} MiB)",
        flush=True,
    )
    rules = make_rules(relations, RelationSettings(tau_p=0.8, tau_q=0.1))
    rng = np.random.default_rng(1)
    rows = flags.FLAGS.rows
    image = np.arange(rows) // 300
    classes = rng.integers(0, dataset.num_classes, rows)
    boxes = np.asarray(dataset.boxes[rng.integers(0, len(dataset.boxes), rows)])
    scores = rng.random(rows).astype(np.float32) ** 4
    start = time.perf_counter()
    changed = (rescore(rules, image, classes, scores, boxes) != scores).sum()
    seconds = time.perf_counter() - start
    print(
        f"re-scoring {rows:,} rows with {len(rules.expected.classes)} + "
        f"{len(rules.outer.classes)} pairs: {seconds:.2f} s, {changed} scores changed"
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
