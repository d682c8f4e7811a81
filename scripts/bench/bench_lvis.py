"""Speed and memory of the LVIS metric at the size of LVIS's validation set, beside lvis-api's.

    python -m scripts.bench.bench_lvis [--images=20000] [--detections=300] [--official_images=2000]

Generates a dataset directory and a table of masks (not counted), with as many classes, checked
classes and objects a photo as LVIS v1 has, and scores the table in a process of its own: reading,
checking, matching and ranking. Prints the seconds and the peak memory of that process. The official
tool needs far more memory than there is for all photos, so that both score the table's first
--official_images in processes of their own, from files to figures; prints both times, both peaks of
memory and by how much the figures differ. The official tool's time and memory grow in proportion to
the photos (it visits each pair of photo and class), ours more slowly.
"""

import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from faster_coco_eval import mask as coco_mask

from common.data.dataset import ABSENT, NOT_EXHAUSTIVE, Dataset, DatasetWriter
from common.io.commands import run_main
from common.masks import rle
from common.metrics.coverage import selected_chunks
from common.metrics.lvis import evaluate_lvis
from common.tables import DetectionsReader, DetectionsWriter
from scripts.bench import generated
from scripts.bench.timing import peak_mib, run_alone

PHOTO = (480, 640)  # height, width
OBJECTS, PRESENT, NEGATIVE, FORGIVEN = 12, 4, 9, 1  # objects and classes of a photo
SHAPES, VARIANTS = 400, 5  # different masks of the truth, and different detections of each
SIDE, SPREAD = 22.0, 1.1  # of squares as large as the objects: quartiles 10, 22 and 46 pixels
FREQUENT, COMMON = 0.33, 0.38  # shares of the classes


def define_flags() -> None:
    flags.DEFINE_integer("images", 20_000, "Photos of the split.")
    flags.DEFINE_integer("detections", 300, "Detections a photo.")
    flags.DEFINE_integer("classes", 1203, "Classes.")
    flags.DEFINE_float("checked", 0.5, "Share of the detections of classes checked there.")
    flags.DEFINE_integer("official_images", 2000, "Photos that the official tool scores; 0: none.")


def generate(folder: Path) -> None:
    """Writes folder/set and folder/detections.parquet."""
    rng, count, classes = np.random.default_rng(0), flags.FLAGS.detections, flags.FLAGS.classes
    truth, found = _stock(rng)
    scale = np.array([PHOTO[1], PHOTO[0]] * 2)
    sizes = np.tile(np.array(PHOTO, np.int32), (SHAPES * VARIANTS, 1))
    truth_boxes = rle.tight_boxes(truth, sizes[:SHAPES]) / scale
    found_boxes = rle.tight_boxes(found.tolist(), sizes) / scale
    areas = rle.areas(truth) / np.prod(PHOTO)
    labels = generated.class_labels(classes)
    names, shares = np.array(labels), generated.rank_frequencies(rng, classes)
    ranks = np.argsort(np.argsort(-shares)) / classes
    letters = np.where(ranks < FREQUENT, "f", np.where(ranks < FREQUENT + COMMON, "c", "r"))
    extra = {"frequency": letters.tolist(), "category_ids": list(range(1, classes + 1))}
    options: dict[str, Any] = {"has_masks": True, "has_areas": True, "extra": extra}
    with (
        DatasetWriter(folder / "set", "bench", labels, labels, None, **options) as dataset,
        DetectionsWriter(folder / "detections.parquet", {"model": "x"}, masks=True) as table,
    ):
        for number in range(flags.FLAGS.images):
            checked = rng.choice(classes, PRESENT + NEGATIVE, replace=False, p=shares)
            objects = np.append(checked[:PRESENT], rng.choice(checked[:PRESENT], OBJECTS - PRESENT))
            shapes = rng.integers(SHAPES, size=OBJECTS)
            dataset.add_image(
                f"{number + 1}",
                f"{number + 1}.jpg",
                PHOTO,
                truth_boxes[shapes],
                objects.tolist(),
                label_classes=[*checked[PRESENT:].tolist(), *checked[:FORGIVEN].tolist()],
                label_confidences=[ABSENT] * NEGATIVE + [NOT_EXHAUSTIVE] * FORGIVEN,
                masks=[{"size": PHOTO, "counts": truth[shape].decode()} for shape in shapes],
                areas=areas[shapes],
            )
            near = rng.integers(OBJECTS, size=count)
            right = rng.random(count) < 0.5
            shape = np.where(right, shapes[near], rng.integers(SHAPES, size=count))
            chosen = shape * VARIANTS + rng.integers(VARIANTS, size=count)
            detected = np.where(right, objects[near], rng.choice(checked, count))
            elsewhere = rng.random(count) >= flags.FLAGS.checked
            detected = np.where(elsewhere, rng.integers(classes, size=count), detected)
            columns = (names[detected], rng.random(count), found_boxes[chosen], found[chosen])
            table.add(f"{number + 1}", *columns, sizes[:count])
        dataset.add_split("val", range(flags.FLAGS.images))


def _stock(rng: np.random.Generator) -> tuple[list[bytes], np.ndarray]:
    """Run lengths of SHAPES blobs, and of VARIANTS copies of each, moved by a tenth of its side."""
    shapes, moved = [], []
    for side in SIDE * np.exp(SPREAD * rng.normal(size=SHAPES)):
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radii = np.clip(side / np.sqrt(np.pi), 2, 220) * rng.uniform(0.8, 1.2, 24)
        blob = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        centre = rng.uniform(0.1, 0.9, 2) * PHOTO[::-1]
        places = centre + np.append(np.zeros((1, 2)), rng.normal(0, side / 10, (VARIANTS, 2)), 0)
        polygons = [np.append(blob + place, []).tolist() for place in places]
        codes = [coco_mask.segmToRle([polygon], *PHOTO[::-1]) for polygon in polygons]
        shape, *copies = [code["counts"] for code in codes]
        shapes.append(shape)
        moved += copies
    return shapes, np.array([*moved, None], object)[:-1]


def score(folder: Path, table: str) -> dict[str, float]:
    """Scores a generated table; prints seconds and peak memory."""
    start = time.perf_counter()
    dataset, path = Dataset.open(folder / "set"), folder / table
    options: dict[str, Any] = {"masks": True, "allow_partial": True, "say": lambda _: None}
    figures = evaluate_lvis(dataset, "val", path, **options)
    rows = DetectionsReader(path).num_rows
    _print("ours", rows, dataset.num_classes, time.perf_counter() - start, figures["AP"])
    return {"seconds": time.perf_counter() - start, **figures}


def score_officially(folder: Path) -> dict[str, float]:
    """The same by lvis-api."""
    # Its drawing module wants matplotlib and OpenCV; NumPy 2 has no np.float.
    sys.modules["lvis.vis"] = types.SimpleNamespace(LVISVis=None)  # type: ignore[assignment]
    np.float = float  # type: ignore[attr-defined]
    import lvis

    start = time.perf_counter()
    rows = json.loads((folder / "results.json").read_text())
    evaluation = lvis.LVISEval(str(folder / "truth.json"), rows, "segm")
    evaluation.run()
    seconds, figures = time.perf_counter() - start, dict(evaluation.results)
    _print("lvis-api", len(rows), len(evaluation.params.cat_ids), seconds, figures["AP"])
    return {"seconds": seconds, **figures}


def _print(name: str, rows: int, classes: int, seconds: float, figure: float) -> None:
    print(
        f"{name}: {rows:,} masks, {classes} classes: {seconds:.1f} s (CPU "
        f"{time.process_time():.1f} s), peak memory {peak_mib() / 1024:.2f} GiB, AP {figure:.6f}",
        flush=True,
    )


def write_part(folder: Path, count: int) -> None:
    """Writes the first images of the table as folder/part.parquet, truth.json and results.json."""
    dataset, reader = Dataset.open(folder / "set"), DetectionsReader(folder / "detections.parquet")
    places = dataset.find_images(reader.image_ids)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(count):
        classes, confidences = dataset.image_labels(image)
        lists = [(1 + classes[confidences == c]).tolist() for c in (ABSENT, NOT_EXHAUSTIVE)]
        fields = ("id", "height", "width", "neg_category_ids", "not_exhaustive_category_ids")
        images.append(dict(zip(fields, (image + 1, *PHOTO, *lists), strict=True)))
        boxes, objects, _ = dataset.image_boxes(image)
        columns = (boxes.tolist(), objects.tolist(), dataset.image_masks(image))
        for box, label, segment in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": label + 1,
                    "bbox": box,
                    "segmentation": segment,
                    "area": int(rle.areas([segment["counts"].encode()])[0]),
                }
            )
    with DetectionsWriter(folder / "part.parquet", {}, masks=True) as table:
        selected = (places >= 0) & (places < count)
        for chunk in selected_chunks(reader, dataset.class_labels, selected, masks=True):
            for place in np.unique(chunk.image_index):
                own = chunk.take(chunk.image_index == place)
                labels = [own.labels[i] for i in own.label_index]
                image_id = reader.image_ids[place]
                assert own.masks is not None
                table.add(image_id, labels, own.scores, own.boxes, own.masks, own.mask_sizes)
                pairs = zip(own.label_index.tolist(), own.scores.tolist(), own.masks, strict=True)
                results += [
                    {
                        "image_id": int(image_id),
                        "category_id": label + 1,
                        "score": value,
                        "segmentation": {"size": PHOTO, "counts": counts.decode()},
                    }
                    for label, value, counts in pairs
                ]
    letters = dataset.meta["frequency"]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "frequency": letter}
            for i, (name, letter) in enumerate(zip(dataset.class_labels, letters, strict=True))
        ],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), flags.FLAGS.official_images
        start = time.perf_counter()
        generate(folder)
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        run_alone(score, folder, "detections.parquet")
        if not count:
            return
        write_part(folder, min(count, flags.FLAGS.images))
        ours, theirs = run_alone(score, folder, "part.parquet"), run_alone(score_officially, folder)
        difference = max(abs(ours[key] - theirs[key]) for key in theirs.keys() - {"seconds"})
        print(f"ratio lvis-api / ours on this part: {theirs['seconds'] / ours['seconds']:.1f}x")
        print(f"largest difference of a figure: {difference:g}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
