"""COCO AP of a detections table."""

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from common.metrics.coco import CLASS_AP, NAMES, evaluate_coco
from common.metrics.readiness import check_metric
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


def with_masks(folder, masks):
    """Squares of 10 pixels in a row, with these masks; and a table that finds them all."""
    boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(len(masks))])
    with DatasetWriter(folder / "set", "m", LABELS, LABELS, None, "", has_masks=True) as writer:
        writer.add_image("7", "x.jpg", (40, 80), boxes / [80, 40, 80, 40], [0] * 3, masks=masks)
        writer.add_split("all", [0])
    pixels = np.zeros((len(masks), 40, 80), bool)
    for place, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[place, y0:y1, x0:x1] = True
    with DetectionsWriter(folder / "x.parquet", {}, masks=True) as writer:
        found = (boxes / [80, 40, 80, 40]).astype(np.float32)
        scores = np.linspace(0.9, 0.7, len(masks))
        sizes = np.tile((40, 80), (len(masks), 1))
        writer.add("7", ["cat"] * len(masks), scores, found, rle.encode(pixels), sizes)
    return Dataset.open(folder / "set"), folder / "x.parquet"


def square(left):
    return [[left, 0, left + 10, 0, left + 10, 10, left, 10]]


def test_an_object_without_mask_is_one_that_nothing_matches_and_is_named(tmp_path):
    dataset, table = with_masks(tmp_path, [square(0), square(20), None])
    said = []
    result = evaluate_coco(dataset, "all", table, masks=True, say=said.append)
    assert result["AP"] == pytest.approx(67 / 101)  # recalls up to 2/3 of 101, and one wrong one
    assert result["AR100"] == pytest.approx(2 / 3)
    assert any("1 of 3 boxes have no mask" in t and "image '7', box 2 (cat)" in t for t in said)


def test_masks_that_the_metric_does_not_know_are_refused_before_it_starts(tmp_path):
    for masks, text in (
        ([None] * 3, r"image '7', box 0 \(cat\) has no mask, nor has another"),
        ([None, {"png": "a.png"}, None], r"image '7', box 1 \(cat\) has a PNG file as mask"),
    ):
        dataset, table = with_masks(tmp_path / str(len(text)), masks)
        with pytest.raises(UserError, match=text):
            evaluate_coco(dataset, "all", table, masks=True)
        if any(masks):
            with pytest.raises(UserError, match=text):
                check_metric(dataset, "all", "coco_masks")
