"""Candidate trees an hour of the ensemble search at the size of the paper's: 11 tables.

    python -m scripts.bench.bench_search [--tables=11] [--images=4000] [--trees=300] [--joint]

Generates a dataset directory and detections tables (not counted), searches and prints trees/hour,
for the whole search and, without the compilation at its beginning, for its second half. Then
applies the tree found to the tables, as `ensemble.merge` does, scores the result with the
evaluator and says by how much that differs from the search's own figure.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.commands import run_main
from common.metrics.openimages import MEAN_AP, evaluate_openimages
from common.tables import Detections, DetectionsWriter
from configs.ensemble import auto
from ensemble.chunks import aligned_chunks
from ensemble.inputs import open_tables
from ensemble.operators.groups import Rows
from ensemble.search import search_tables
from ensemble.tree import binary_tree as trees
from scripts.bench import generated
from scripts.bench.timing import peak_mib

BOXES, LABELS = 7, 12  # of an image: truth, and classes verified


def generate(folder: Path, rng: np.random.Generator) -> list[str]:
    """Writes folder/set and the tables; returns their paths."""
    num_classes, num_tables = flags.FLAGS.classes, flags.FLAGS.tables
    classes = generated.class_labels(num_classes)
    names, frequencies = np.array(classes), generated.rank_frequencies(rng, num_classes)
    hierarchy = {"LabelName": "/m/root", "Subcategory": [{"LabelName": c} for c in classes]}
    paths = [folder / f"model{place:02d}.parquet" for place in range(num_tables)]
    writers = [DetectionsWriter(path, {"model": path.stem}) for path in paths]
    with DatasetWriter(folder / "set", "bench", classes, classes, hierarchy, "") as dataset:
        for number in range(flags.FLAGS.images):
            image_id = generated.image_id(number)
            boxes = generated.random_boxes(rng, BOXES)
            labels = rng.choice(num_classes, BOXES, p=frequencies)
            group_of = np.where(rng.random(BOXES) < 0.1, GROUP_OF, 0)
            verified = np.unique([*labels, *rng.choice(num_classes, LABELS - BOXES)])
            dataset.add_image(
                image_id,
                "x.jpg",
                (768, 1024),
                boxes,
                labels.tolist(),
                group_of.tolist(),
                verified.tolist(),
                np.isin(verified, labels).tolist(),
            )
            # All models see the same: objects, some of them hard, and things taken for objects.
            things = np.concatenate([boxes, generated.random_boxes(rng, BOXES)])
            things_classes = np.concatenate([labels, rng.choice(verified, BOXES)])
            appeal = np.concatenate([rng.beta(3, 2, BOXES), rng.beta(1, 4, BOXES)])
            for place, writer in enumerate(writers):
                weakness = place / num_tables
                columns = detect(rng, weakness, things, things_classes, appeal, num_classes)
                writer.add(image_id, names[columns[0]], *columns[1:])
        dataset.add_split("val_a", range(flags.FLAGS.images))
    for writer in writers:
        writer.close()
    return [str(path) for path in paths]


def detect(rng, weakness, boxes, labels, appeal, num_classes):
    """Labels, scores and boxes of 40 to 100 detections: half near things, half anywhere."""
    rows = rng.integers(40, 101)
    hits = rng.random(rows) < 0.5
    seen = appeal + rng.normal(0, 0.2 + 0.1 * weakness, len(boxes))
    target = rng.choice(len(boxes), rows, p=np.exp(2 * seen) / np.exp(2 * seen).sum())
    sides = np.tile(boxes[target, 2:] - boxes[target, :2], 2)
    spread = 0.05 + 0.1 * weakness + 0.1 * rng.random((rows, 1))
    near = boxes[target] + rng.normal(0, 1, (rows, 4)) * spread * sides
    anywhere = generated.random_boxes(rng, rows, largest=0.2)
    place = generated.clip_boxes(np.where(hits[:, None], near, anywhere))
    judged = rng.random(rows) < flags.FLAGS.verified
    noise = np.where(judged, labels[target], rng.integers(0, num_classes, rows))
    scores = np.where(hits, seen[target] + rng.normal(0, 0.1, rows), rng.beta(1, 6, rows))
    return np.where(hits, labels[target], noise), scores.clip(0, 1), place


def official_score(dataset: Dataset, tree: trees.Tree, inputs: list[str]) -> float:
    """mAP of the merged tables by the evaluator."""
    tables = open_tables(inputs, labels=dataset.class_labels)
    merged = []
    for chunk in aligned_chunks(tables):
        rows = Rows(chunk.groups(dataset.num_classes), chunk.scores, chunk.boxes, chunk.models)
        merged.append(
            trees.apply(tree, [rows.take(rows.model == i) for i in range(len(tables.names))])
        )
    group, scores, boxes = (
        np.concatenate([getattr(rows, name) for rows in merged])
        for name in ("group", "scores", "boxes")
    )
    image = group // dataset.num_classes
    order = np.lexsort((np.arange(len(group)), -scores, image))
    detections = Detections(
        image_ids=tables.image_ids,
        labels=dataset.class_labels,
        image_index=image[order].astype(np.int32),
        label_index=(group % dataset.num_classes)[order].astype(np.int32),
        scores=scores[order],
        boxes=boxes[order],
        metadata={},
    )
    return evaluate_openimages(dataset, "val_a", detections)[MEAN_AP.format(0.5)]


def define_flags() -> None:
    flags.DEFINE_integer("tables", 11, "Detections tables.")
    flags.DEFINE_integer("images", 4000, "Images.")
    flags.DEFINE_integer("classes", 500, "Classes.")
    flags.DEFINE_float("verified", 0.7, "Share of false detections on classes verified there.")
    flags.DEFINE_integer("trees", 300, "Trees to try.")
    flags.DEFINE_bool("joint", False, "One stage; else a third of the trees are of stage one.")


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        inputs = generate(folder, np.random.default_rng(0))
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        config = auto.get_config("joint" if flags.FLAGS.joint else None)
        total = flags.FLAGS.trees
        stages = dict(topology=total // 3, operators=total - total // 3, joint=0)
        if flags.FLAGS.joint:
            stages = dict(topology=0, operators=0, joint=total)
        config.search.trees = stages
        config.search.save_seconds = 0.0
        dataset = Dataset.open(folder / "set")
        marks = []

        def say(text: str) -> None:
            state = folder / "tree.search.json"
            if state.exists():
                saved = json.loads(state.read_text())["state"]
                marks.append((saved["stage"], saved["tried"], saved["seconds"]))
            print(text, flush=True)

        used = time.process_time()
        tree = search_tables(inputs, config, dataset, "val_a", None, folder / "tree.json", say=say)
        seconds = json.loads((folder / "tree.search.json").read_text())["state"]["seconds"]
        print(f"{total} trees in {seconds:.0f} s: {3600 * total / seconds:.0f} trees/hour")
        print(f"CPU seconds of the process: {time.process_time() - used:.0f}")
        print(f"peak memory of the search {peak_mib() / 1024:.2f} GiB", flush=True)
        before = [0, *list(stages.values())]
        points = [(sum(before[: s + 1]) + tried, spent) for s, tried, spent in marks]
        later = [point for point in points if total / 2 <= point[0] < total]
        if later:
            tried, spent = later[0]
            rate = 3600 * (total - tried) / (seconds - spent)
            print(f"the last {total - tried}: {rate:.0f} trees/hour")
        notes = trees.read_notes(folder / "tree.json")
        official = official_score(dataset, tree, inputs)
        difference = abs(official - notes["scores"]["tree"][0])
        print(f"mAP of the merged tables by the evaluator: {official:.6f}, differs {difference:g}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
