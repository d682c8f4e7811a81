"""Calibrating by masks: right boxes with wrong masks are worth nothing."""

import json

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.masks import rle
from common.tables import DetectionsWriter
from configs.ensemble import calibrated
from ensemble.calibrate import calibrate_tables
from ensemble.calibration import recipes
from ensemble.merge import merge_tables

SIZE = (20, 20)


def encoded(top, bottom):
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, 4:16] = True
    return rle.encode(mask[None])[0]


@pytest.fixture
def folder(tmp_path):
    """One object a photo; table "good" has its mask, "thin" a stripe of it, both the same boxes."""
    rng = np.random.default_rng(0)
    box = [[4 / 20, 2 / 20, 16 / 20, 18 / 20]]
    tree = {"LabelName": "root", "Subcategory": []}
    with (
        DatasetWriter(tmp_path / "set", "x", ["cat"], ["cat"], tree, "", has_masks=True) as writer,
        DetectionsWriter(tmp_path / "good.parquet", {}, masks=True) as good,
        DetectionsWriter(tmp_path / "thin.parquet", {}, masks=True) as thin,
    ):
        rows = []
        for number in range(12):
            name = f"i{number:02d}"
            segment = {"size": list(SIZE), "counts": encoded(2, 18).decode()}
            rows.append(writer.add_image(name, "x.jpg", SIZE, box, [0], masks=[segment]))
            # Beside the object something that is none.
            boxes = np.array([*box, [0, 0, 0.15, 0.15]], np.float32)
            for table, bottom in ((good, 17), (thin, 6)):
                masks = [encoded(2, bottom), encoded(0, 2)]
                scores = np.sort(rng.uniform(0.3, 0.9, 2))[::-1]
                table.add(name, ["cat"] * 2, scores, boxes, masks, np.array([SIZE] * 2))
        writer.add_split("val", rows)
    return tmp_path


def test_masks_decide_what_a_table_is_worth(folder, monkeypatch):
    monkeypatch.setattr(recipes, "OPERATORS", recipes.OPERATORS[:1])
    inputs = [str(folder / "good.parquet"), str(folder / "thin.parquet")]
    lines = []
    calibrate_tables(
        inputs,
        calibrated.get_config(),
        Dataset.open(folder / "set"),
        "val",
        folder / "cal.json",
        metric="coco_masks",
        num_folds=3,
        say=lines.append,
    )
    right = {
        line.split()[0]: float(line.split()[2])
        for line in lines
        if line.split()[:1] in (["good"], ["thin"]) and len(line.split()) > 6
    }
    # Of two detections a photo one; at IoU 15 / 16 it passes nine thresholds of ten.
    assert right == {"good": pytest.approx(0.45, abs=1e-3), "thin": 0.0}
    content = json.loads((folder / "cal.json").read_text())
    assert content["metric"] == "coco_masks" and "good" in content["recipe"]["models"]
    assert content["notes"]["single"][0] > 0.5
    config = calibrated.get_config()
    config.calibration, config.masks = str(folder / "cal.json"), True
    merge_tables(inputs, config, folder / "m.parquet", say=lambda *_, **__: None)
