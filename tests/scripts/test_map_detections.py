"""scripts.map_detections on the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import DatasetWriter
from common.tables import DetectionsWriter, read_detections

ROOT = Path(__file__).parents[2]


def run(folder, *args, mapping="{}/mapping.csv:coco:mid"):
    command = [
        sys.executable, "-m", "scripts.map_detections", f"--detections={folder / 'x.parquet'}",
        f"--mapping={mapping.format(folder)}",
        f"--dataset={folder / 'set'}", f"--output={folder / 'y.parquet'}", *args,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mapping.csv").write_text("mid,coco\n/m/c,car\n/m/d,dog\n/m/w,\n")
    with DatasetWriter(tmp_path / "set", "s", ["/m/c", "/m/d"], ["Car", "Dog"], None) as writer:
        writer.add_split("train", [])
    box = np.array([[0, 0, 0.5, 0.5]], np.float32)
    with DetectionsWriter(tmp_path / "x.parquet", {"model": "coco", "step": 3}) as writer:
        writer.add("a", ["kite", "car"], [0.9, 0.8], np.tile(box, (2, 1)))
        writer.add("b", ["kite"], [0.7], box)
        writer.add("c", [], [], box[:0])
    return tmp_path


def test_a_coco_model_becomes_an_expert(folder):
    """Other classes are left out, images without detections stay covered."""
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert "1 detections from 3" in result.stdout
    assert "labels without a target: 1 with 2 rows: kite" in result.stdout
    found = read_detections(folder / "y.parquet")
    assert list(found.image_ids) == ["a", "b", "c"]
    assert [found.labels[i] for i in found.label_index] == ["/m/c"]
    assert found.scores.tolist() == [np.float32(0.8)]
    assert found.metadata["model"] == "coco" and found.metadata["expanded"] is False
    assert found.metadata["classes"] == ["/m/c", "/m/d"]


def test_a_table_of_another_vocabulary_is_refused(folder):
    (folder / "mapping.csv").write_text("mid,coco\n/m/c,bus\n")
    result = run(folder)
    assert result.returncode == 1
    assert "none of its labels (kite, car...) is a source label of" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "y.parquet").exists()


def test_shipped_maps_have_names(folder):
    """The set of this test has made-up labels, none of them an MID of OpenImages."""
    result = run(folder, mapping="coco_to_openimages")
    assert "coco_to_openimages: target '/m/0cmf2' is no class of" in result.stderr
    result = run(folder, mapping="coco_to_pascal")
    assert "or one of coco_to_openimages, lvis_to_coco" in result.stderr
