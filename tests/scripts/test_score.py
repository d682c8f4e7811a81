"""scripts.score and scripts.expand_detections on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import DatasetWriter
from common.masks import rle
from common.tables import DetectionsWriter, read_detections

ROOT = Path(__file__).parents[2]
MEAN = "OpenImagesDetectionChallenge_Precision/mAP@0.5IOU"
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [{"LabelName": "/m/tree", "Subcategory": [{"LabelName": "/m/oak"}]}],
}


def run(script, *args):
    command = [sys.executable, "-m", f"scripts.{script}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    labels, names = ["/m/tree", "/m/oak"], ["Tree", "Oak tree"]
    with DatasetWriter(folder / "set", "trees", labels, names, HIERARCHY, "") as writer:
        writer.add_image("a", "a.jpg", (100, 100), [[0, 0, 0.5, 0.5]], [1])
        writer.add_image("b", "b.jpg", (100, 100), [[0, 0, 0.5, 0.5]], [1])
        writer.add_split("val", [0])
        writer.add_split("both", [0, 1])
    with DetectionsWriter(folder / "x.parquet", {"model": "m"}) as writer:
        writer.add("a", ["/m/oak"], [0.9], [[0, 0, 0.5, 0.5]])
    return folder


def test_scores_a_table_and_says_whether_it_was_expanded(folder):
    where = (f"--dataset={folder / 'set'}", "--split=val")
    plain = run("score", *where, f"--detections={folder / 'x.parquet'}")
    assert plain.returncode == 0, plain.stderr
    assert "expanded to parent classes: no" in plain.stdout
    assert "0.5000" in plain.stdout and "Oak tree" in plain.stdout
    output = folder / "out.json"
    flag = run(
        "score",
        *where,
        f"--detections={folder / 'x.parquet'}",
        "--expand_predictions",
        f"--json={output}",
    )
    assert "yes, by --expand_predictions" in flag.stdout
    prefix = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/"
    assert json.loads(output.read_text()) == {
        MEAN: 1.0,
        f"{prefix}/m/tree": 1.0,
        f"{prefix}/m/oak": 1.0,
    }

    expand = (f"--detections={folder / 'x.parquet'}", f"--dataset={folder / 'set'}")
    expanded = run("expand_detections", *expand, f"--output={folder / 'y.parquet'}")
    assert expanded.returncode == 0, expanded.stderr
    found = read_detections(folder / "y.parquet")
    assert found.metadata == {"model": "m", "expanded": True}
    assert len(found) == 2
    # The flag does not expand a table that says it is expanded.
    table = run("score", *where, f"--detections={folder / 'y.parquet'}", "--expand_predictions")
    assert "yes, in the table" in table.stdout and "1.0000" in table.stdout


def test_coco(folder):
    args = (f"--dataset={folder / 'set'}", "--split=val", f"--detections={folder / 'x.parquet'}")
    result = run("score", "--metric=coco", *args, f"--json={folder / 'coco.json'}")
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "coco.json").read_text())
    assert values["AP"] == pytest.approx(1.0)
    assert values["APlarge"] == -1.0


def test_openimages_masks(tmp_path):
    labels, box = ["/m/tree", "/m/oak"], [0, 0, 0.5, 0.5]
    tree = np.zeros((10, 10), bool)
    tree[:5, :5] = True
    with DatasetWriter(
        tmp_path / "set", "trees", labels, labels, HIERARCHY, "", has_masks=True
    ) as writer:
        Image.fromarray(np.kron(tree, np.ones((3, 3), bool))).save(tmp_path / "a.png")
        entry = {"png": str(tmp_path / "a.png")}
        writer.add_image("a", "a.jpg", (100, 100), [box, box], [1, 0], masks=[entry, None])
        writer.add_split("val", [0])
    with DetectionsWriter(tmp_path / "x.parquet", {"model": "m"}, masks=True) as writer:
        writer.add("a", ["/m/oak"], [0.9], [box], rle.encode([tree]), [[10, 10]])
    result = run(
        "score",
        "--metric=openimages_masks",
        f"--dataset={tmp_path / 'set'}",
        "--split=val",
        f"--detections={tmp_path / 'x.parquet'}",
        "--expand_predictions",
        f"--json={tmp_path / 'out.json'}",
    )
    assert result.returncode == 0, result.stderr
    prefix = "OpenImagesInstanceSegmentationChallenge_P"
    assert json.loads((tmp_path / "out.json").read_text()) == {
        f"{prefix}recision/mAP@0.5IOU": 1.0,
        f"{prefix}erformanceByCategory/AP@0.5IOU//m/tree": 1.0,
        f"{prefix}erformanceByCategory/AP@0.5IOU//m/oak": 1.0,
    }
    assert "yes, by --expand_predictions" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split=both"], "covers 1 of the 2 images of split 'both', 'b' is missing"),
        (["--metric=voc"], "--metric=voc: expected one of openimages, openimages_masks, coco"),
        (["--metric=openimages_masks"], "set: the dataset has no masks"),
        (["--metric=lvis"], "no frequency of the classes"),
        (["--split=test"], "no split 'test'"),
        (["--detections=nothing.parquet"], "nothing.parquet: no such file"),
        (["--dataset=nowhere"], "nowhere"),
        (["extra"], "unexpected argument 'extra'"),
        (["--json=/dev/null/x.json"], "/dev/null/x.json: cannot write"),
    ],
)
def test_user_errors_are_one_line(folder, flags, message):
    base = [
        f"--dataset={folder / 'set'}",
        "--split=val",
        f"--detections={folder / 'x.parquet'}",
        f"--json={folder / 'never.json'}",
    ]
    result = run("score", *base, *flags)
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "never.json").exists()
