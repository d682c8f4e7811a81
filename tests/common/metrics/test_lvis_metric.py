"""LVIS AP: equal to plain loops, to the official tool, and blind to what LVIS did not check."""

import json
import sys
import types

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics.coco import evaluate_coco
from common.metrics.lvis import CLASS_AP, evaluate_lvis
from common.metrics.lvis_matching import Shapes, match
from common.tables import DetectionsWriter, read_detections
from tests.oracles.lvis import lvis_ap
from tests.prepare_data_cli import prepare

LABELS = ["ant", "bee", "cat", "dog", "eel"]
FREQUENCY = ["r", "c", "f", "f", "r"]
# Powers of two: fractions of them are exact, so overlaps that equal a threshold stay equal.
IMAGES = {9: (64, 64), 10: (128, 256), 200: (256, 256), 30: (64, 128)}


def draw_shape(rng, height, width):
    """A box in pixels, xywh, of whole pixels."""
    x0, x1 = sorted(rng.choice(width + 1, 2, replace=False).tolist())
    y0, y1 = sorted(rng.choice(height + 1, 2, replace=False).tolist())
    return [x0, y0, x1 - x0, y1 - y0]


def draw_mask(rng, box, height, width):
    """An L-shaped part of the box."""
    x, y, w, h = box
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    mask[y : y + rng.integers(0, h), x : x + rng.integers(0, w)] = 0
    return mask


def coded(mask):
    code = coco_mask.encode(mask)
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def build(folder, seed, per_image=12):
    """An LVIS file, its dataset, and detections that hit some of the truth, ties included."""
    rng = np.random.default_rng(seed)
    images, annotations, detections = [], [], []
    for image, (height, width) in IMAGES.items():
        positive = rng.choice(5, 3, replace=False)
        rest = np.setdiff1d(np.arange(5), positive)
        images.append(
            {
                "id": image,
                "height": height,
                "width": width,
                "coco_url": f"http://x/val2017/{image:012d}.jpg",
                "neg_category_ids": [int(c) + 1 for c in rest[:1]],
                "not_exhaustive_category_ids": [int(c) + 1 for c in positive[:1]],
            }
        )
        for label in rng.choice(positive, 6).tolist():
            box = draw_shape(rng, height, width)
            mask = draw_mask(rng, box, height, width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "bbox": box,
                    "segmentation": coded(mask),
                    "area": int(mask.sum()),
                }
            )
            moved = np.array(box) + rng.integers(-3, 4, 4)
            x, y = np.clip(moved[:2], 0, [width - 1, height - 1])
            w, h = np.clip(moved[2:], 1, [width - x, height - y])
            detections.append((image, label, [int(v) for v in (x, y, w, h)]))
        for label in rng.integers(0, 5, per_image).tolist():
            detections.append((image, label, draw_shape(rng, height, width)))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "frequency": letter}
            for i, (name, letter) in enumerate(zip(LABELS, FREQUENCY, strict=True))
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "lvis_v1_val.json").write_text(json.dumps(content))
    dataset = prepare("lvis", source=folder / "lvis_v1_val.json", output=folder / "set")
    found = []
    for image, label, box in detections:
        mask = draw_mask(rng, box, *IMAGES[image])
        score = float(np.float32(rng.integers(1, 8) / 8))
        found.append({"image": image, "class": label, "box": box, "mask": mask, "score": score})
    return content, dataset, found


def write_table(path, found):
    with DetectionsWriter(path, {}, masks=True) as writer:
        for image, (height, width) in IMAGES.items():
            own = [d for d in found if d["image"] == image]
            boxes = np.array([d["box"] for d in own], np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            writer.add(
                str(image),
                [LABELS[d["class"]] for d in own],
                np.array([d["score"] for d in own], np.float32),
                boxes / [width, height, width, height],
                [coco_mask.encode(d["mask"])["counts"] for d in own],
                np.broadcast_to((height, width), (len(own), 2)),
            )
    return path


def by_loops(content, found, masks):
    images = {
        image["id"]: {
            "negative": [c - 1 for c in image["neg_category_ids"]],
            "not_exhaustive": [c - 1 for c in image["not_exhaustive_category_ids"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    }

    def truth_shape(a):
        code = a["segmentation"]
        code = {**code, "counts": code["counts"].encode()}
        return coco_mask.decode(code).astype(bool) if masks else a["bbox"]

    truth = [
        {
            "image": a["image_id"],
            "class": a["category_id"] - 1,
            "shape": truth_shape(a),
            "area": a["area"],
        }
        for a in content["annotations"]
    ]
    detections = [
        {
            **d,
            "shape": d["mask"].astype(bool) if masks else d["box"],
            "area": int(d["mask"].sum()) if masks else d["box"][2] * d["box"][3],
        }
        for d in found
    ]
    return lvis_ap(images, truth, detections, FREQUENCY)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_loops(tmp_path, seed, masks):
    content, dataset, found = build(tmp_path, seed)
    table = write_table(tmp_path / "x.parquet", found)
    expected, classes = by_loops(content, found, masks)
    result = evaluate_lvis(dataset, "val", table, masks=masks)
    assert {k: v for k, v in result.items() if "/" not in k} == pytest.approx(expected, abs=1e-9)
    assert {k: v for k, v in result.items() if "/" in k} == pytest.approx(
        {CLASS_AP.format(LABELS[c]): ap for c, ap in classes.items()}, abs=1e-9
    )
    assert 0 < result["AP"] < 1
    memory = read_detections(table, dataset.class_labels, masks=True)
    assert evaluate_lvis(dataset, "val", memory, masks=masks) == result


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(10, 13))
def test_equals_the_official_tool(tmp_path, seed, masks, monkeypatch):
    reason = "compares with the reference implementation"
    pytest.importorskip("pycocotools", reason=reason)
    # Its drawing module wants matplotlib and OpenCV.
    monkeypatch.setitem(sys.modules, "lvis.vis", types.SimpleNamespace(LVISVis=None))
    lvis = pytest.importorskip("lvis", reason=reason)
    monkeypatch.setattr(np, "float", float, raising=False)  # gone from NumPy 2
    content, dataset, found = build(tmp_path, seed)
    rows = []
    # The table's order, in which equal scores rank.
    for image in IMAGES:
        for d in sorted((d for d in found if d["image"] == image), key=lambda d: -d["score"]):
            row = {"image_id": image, "category_id": d["class"] + 1, "score": d["score"]}
            shape = {"segmentation": coded(d["mask"])} if masks else {"bbox": d["box"]}
            rows.append(row | shape)
    official = lvis.LVISEval(str(tmp_path / "lvis_v1_val.json"), rows, "segm" if masks else "bbox")
    official.run()
    result = evaluate_lvis(dataset, "val", write_table(tmp_path / "x.parquet", found), masks=masks)
    assert {k: v for k, v in result.items() if "/" not in k} == pytest.approx(
        dict(official.results), abs=1e-9
    )


def test_only_the_best_300_of_an_image_count(tmp_path):
    """Over all classes, before classes that were not checked are left out."""
    content, dataset, found = build(tmp_path, 5)
    label = content["annotations"][0]["category_id"] - 1
    box = [0, 0, 60, 60]
    mask = draw_mask(np.random.default_rng(0), box, *IMAGES[9])
    other = {"image": 9, "class": (label + 1) % 5, "box": box, "mask": mask, "score": 1.0}
    crowded = [other] * 300 + found
    alone = [d for d in found if d["image"] != 9]
    for rows in (crowded, crowded[:295] + found):
        expected, _ = by_loops(content, rows, masks=False)
        result = evaluate_lvis(dataset, "val", write_table(tmp_path / "x.parquet", rows))
        assert result["AP"] == pytest.approx(expected["AP"], abs=1e-9)
    both = [write_table(tmp_path / f"{i}.parquet", r) for i, r in enumerate((crowded, alone))]
    recalls = [evaluate_lvis(dataset, "val", path)["AR@300"] for path in both]
    assert recalls[0] <= recalls[1] + 1e-9 or label != other["class"]


def test_perfect_masks_and_no_detections(tmp_path):
    content, dataset, _ = build(tmp_path, 0)
    perfect = []
    for a in content["annotations"]:
        code = {**a["segmentation"], "counts": a["segmentation"]["counts"].encode()}
        perfect.append(
            {
                "image": a["image_id"],
                "class": a["category_id"] - 1,
                "box": a["bbox"],
                "mask": np.asfortranarray(coco_mask.decode(code)),
                "score": 1.0,
            }
        )
    table = write_table(tmp_path / "x.parquet", perfect)
    for masks in (False, True):
        result = evaluate_lvis(dataset, "val", table, masks=masks)
        assert result["AP"] == result["AR@300"] == pytest.approx(1.0)
        assert evaluate_coco(dataset, "val", table, masks=masks)["AP"] == pytest.approx(1.0)
    nothing = evaluate_lvis(dataset, "val", write_table(tmp_path / "y.parquet", []))
    assert nothing["AP"] == nothing["AR@300"] == 0.0


def test_a_chunk_without_masks_of_like_areas_has_no_pairs():
    """As that of a hardly trained model, whose masks are specks."""

    def one(pixels):
        mask = np.zeros((64, 64), np.uint8, order="F")
        mask.T.flat[:pixels] = 1
        counts = np.array([coco_mask.encode(mask)["counts"]], object)
        return Shapes(np.array([3]), counts, np.array([float(pixels)]), np.array([[64, 64]]))

    right, counted = match(one(3), one(900), np.zeros(1, bool))
    assert not right.any()
    assert counted[0, :, 0].all()


@pytest.mark.parametrize("seed", range(2))
def test_coco_mask_ap_equals_pycocotools(tmp_path, seed):
    reason = "compares with the reference implementation"
    coco = pytest.importorskip("pycocotools.coco", reason=reason)
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason=reason)
    content, dataset, found = build(tmp_path, seed)
    reference = coco.COCO()
    reference.dataset = {**content, "info": {}}
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    reference.createIndex()
    rows = [
        {
            "image_id": d["image"],
            "category_id": d["class"] + 1,
            "score": d["score"],
            "segmentation": coded(d["mask"]),
        }
        for d in sorted(found, key=lambda d: -d["score"])
    ]
    evaluation = cocoeval.COCOeval(reference, reference.loadRes(rows), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    table = write_table(tmp_path / "x.parquet", found)
    result = evaluate_coco(dataset, "val", table, masks=True)
    assert list(result.values())[:12] == pytest.approx(evaluation.stats.tolist(), abs=1e-9)


def test_what_cannot_be_scored_is_named(tmp_path):
    content, dataset, found = build(tmp_path, 0)
    table = write_table(tmp_path / "x.parquet", found)
    with DatasetWriter(tmp_path / "plain", "p", LABELS, LABELS, None, "") as writer:
        for image, size in IMAGES.items():
            writer.add_image(str(image), "x.jpg", size, [[0, 0, 1, 1]], [0])
        writer.add_split("val", range(len(IMAGES)))
    plain = Dataset.open(tmp_path / "plain")
    with pytest.raises(UserError, match="no frequency of the classes.*prepare_data lvis"):
        evaluate_lvis(plain, "val", table)
    with pytest.raises(
        UserError, match=r"plain: image '\d+', box 0 .* has no mask, nor has another; expected poly"
    ):
        evaluate_coco(plain, "val", table, masks=True)
    with DetectionsWriter(tmp_path / "small.parquet", {}, masks=True) as writer:
        mask = coco_mask.encode(np.ones((5, 5), np.uint8, order="F"))["counts"]
        for image in IMAGES:
            labels = [LABELS[a["category_id"] - 1] for a in content["annotations"]]
            writer.add(str(image), labels[:1], [0.5], [[0, 0, 1, 1]], [mask], [[5, 5]])
    with pytest.raises(UserError, match="small.parquet: image '.*' has masks of 5x5 .* expected"):
        evaluate_lvis(dataset, "val", tmp_path / "small.parquet", masks=True)
    with DetectionsWriter(tmp_path / "boxes.parquet", {}) as writer:
        for image in IMAGES:
            writer.add(str(image), [], [], [])
    with pytest.raises(UserError, match="boxes.parquet: no mask column"):
        evaluate_lvis(dataset, "val", tmp_path / "boxes.parquet", masks=True)
