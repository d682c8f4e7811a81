"""COCO AP of a detections table."""

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics.coco import CLASS_AP, NAMES, evaluate_coco
from common.tables import DetectionsWriter

LABELS = ["cat", "dog", "unseen"]
SIZES = [(100, 200), (480, 640), (301, 77)]


def build(folder, rng, crowds=0.2):
    """Three images of random boxes, and the boxes again as detections, jittered."""
    truth, found = {}, {}
    with DatasetWriter(folder / "set", "test", LABELS, LABELS, None, "") as writer:
        for index, size in enumerate(SIZES):
            corners = np.sort(rng.random((8, 2, 2)), axis=1).reshape(8, 4).astype(np.float32)
            classes = rng.integers(0, 2, 8)
            flags = GROUP_OF * (rng.random(8) < crowds)
            image_id = f"image{2 - index}"
            writer.add_image(image_id, "x.jpg", size, corners, classes, flags)
            truth[image_id] = (size, corners, classes, flags > 0)
            moved = np.clip(corners + rng.normal(0, 0.05, (8, 4)), 0, 1)
            moved = np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), moved[:, 2:]], 1)
            found[image_id] = (rng.integers(0, 2, 8), rng.random(8), moved.astype(np.float32))
        writer.add_split("all", range(len(SIZES)))
    return Dataset.open(folder / "set"), truth, found


def write_table(path, found):
    with DetectionsWriter(path, {}) as writer:
        for image_id, (classes, scores, boxes) in found.items():
            writer.add(image_id, [LABELS[c] for c in classes], scores, boxes)
    return path


def test_perfect_detections_score_one(tmp_path):
    dataset, truth, _ = build(tmp_path, np.random.default_rng(0), crowds=0.0)
    perfect = {k: (classes, np.ones(8), boxes) for k, (_, boxes, classes, _) in truth.items()}
    result = evaluate_coco(dataset, "all", write_table(tmp_path / "x.parquet", perfect))
    assert result["AP"] == result["AP50"] == result["AR100"] == pytest.approx(1.0)
    assert result[CLASS_AP.format("cat")] == pytest.approx(1.0)
    assert CLASS_AP.format("unseen") not in result


def test_no_detections_score_zero(tmp_path):
    dataset, truth, _ = build(tmp_path, np.random.default_rng(0))
    nothing = {k: ([], [], np.zeros((0, 4))) for k in truth}
    assert evaluate_coco(dataset, "all", write_table(tmp_path / "x.parquet", nothing))["AP"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools(tmp_path, seed):
    reason = "compares with the reference implementation"
    coco = pytest.importorskip("pycocotools.coco", reason=reason)
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason=reason)
    dataset, truth, found = build(tmp_path, np.random.default_rng(seed))

    def pixels(box, size):
        x0, y0, x1, y1 = (float(v) for v in box)
        height, width = size
        return [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]

    images, annotations, rows = [], [], []
    for number, (image_id, (size, boxes, classes, crowds)) in enumerate(truth.items()):
        images.append({"id": number, "height": size[0], "width": size[1]})
        for box, label, crowd in zip(boxes, classes, crowds, strict=True):
            x, y, w, h = pixels(box, size)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowd),
                }
            )
        for label, score, box in zip(*found[image_id], strict=True):
            row = {"image_id": number, "category_id": int(label), "score": float(np.float32(score))}
            rows.append(row | {"bbox": pixels(box, size)})
    reference = coco.COCO()
    reference.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": label} for i, label in enumerate(LABELS)],
        "info": {},
    }
    reference.createIndex()
    evaluation = cocoeval.COCOeval(reference, reference.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    result = evaluate_coco(dataset, "all", write_table(tmp_path / "x.parquet", found))
    assert [result[name] for name in NAMES] == pytest.approx(evaluation.stats.tolist(), abs=1e-9)


def test_overlaps_of_whole_pixels_that_equal_a_threshold_match(tmp_path):
    """The table's float32 of a normalised box must not decide; squares and their halves."""
    places = np.random.default_rng(0).integers(0, 60, (len(SIZES), 6, 2))
    found = {}
    with DatasetWriter(tmp_path / "set", "test", LABELS, LABELS, None, "") as writer:
        for index, (size, corners) in enumerate(zip(SIZES, places, strict=True)):
            corners = np.unique(corners // 10 * 10 + np.array([1, 3]), axis=0)
            scale = np.array([size[1], size[0]] * 2, np.float64)
            whole, half = (
                np.float32(np.concatenate([corners, corners + sides], axis=1) / scale)
                for sides in ((10, 10), (10, 5))
            )
            writer.add_image(str(index), "x.jpg", size, whole, [0] * len(whole))
            found[str(index)] = ([0] * len(half), np.linspace(1, 0.5, len(half)), half)
        writer.add_split("all", range(len(SIZES)))
    table = write_table(tmp_path / "x.parquet", found)
    result = evaluate_coco(Dataset.open(tmp_path / "set"), "all", table)
    assert result["AP50"] == pytest.approx(1.0) and result["AP"] == pytest.approx(0.1)


def test_unknown_image_sizes_are_named(tmp_path):
    with DatasetWriter(tmp_path / "set", "test", LABELS, LABELS, None, "") as writer:
        writer.add_image("a", "a.jpg", (0, 0), [[0, 0, 1, 1]], [0])
        writer.add_split("all", [0])
    table = write_table(tmp_path / "x.parquet", {"a": ([], [], np.zeros((0, 4)))})
    with pytest.raises(UserError, match="size of image 'a' is unknown"):
        evaluate_coco(Dataset.open(tmp_path / "set"), "all", table)
