"""scripts.restrict_detections on the command line, and scripts.truth_table."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, DatasetWriter
from common.tables import DetectionsWriter, read_detections

ROOT = Path(__file__).parents[2]
BOXES = np.float32([[0, 0, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.9, 0.9]])


def run(module, *args):
    command = [sys.executable, "-m", f"scripts.{module}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    with DatasetWriter(folder / "set", "s", ["/m/c", "/m/d"], ["Car", "Dog"], None) as writer:
        writer.add_image("a", "a.jpg", boxes=BOXES, classes=[0, 1, 1], flags=[0, 0, GROUP_OF])
        writer.add_image("b", "b.jpg")
        writer.add_image("c", "c.jpg")
        writer.add_split("train", [2])
        writer.add_split("validation", [0, 1])
    with DetectionsWriter(folder / "x.parquet", {"model": "m", "step": 3}) as writer:
        writer.add("a", ["/m/k", "/m/d", "/m/c"], np.float32([0.9, 0.8, 0.2]), BOXES)
        writer.add("b", ["/m/k"], np.float32([0.7]), BOXES[:1])
        writer.add("z", ["/m/c"], np.float32([0.7]), BOXES[:1])
    return folder


@pytest.mark.parametrize(("score", "kept"), [(0.0, [0.8, 0.2]), (0.5, [0.8])])
def test_photos_and_classes_of_the_split_stay(folder, score, kept):
    result = run(
        "restrict_detections",
        f"--detections={folder / 'x.parquet'}",
        f"--dataset={folder / 'set'}",
        "--split=validation",
        f"--output={folder / 'y.parquet'}",
        f"--min_score={score}",
    )
    assert result.returncode == 0, result.stderr
    found = read_detections(folder / "y.parquet")
    assert list(found.image_ids) == ["a", "b"] and found.image_index.tolist() == [0] * len(kept)
    assert found.scores.tolist() == pytest.approx(kept)
    assert [found.labels[i] for i in found.label_index][0] == "/m/d"


def test_a_table_without_a_photo_of_the_split_is_refused(folder):
    result = run(
        "restrict_detections",
        f"--detections={folder / 'x.parquet'}",
        f"--dataset={folder / 'set'}",
        "--split=train",
        f"--output={folder / 'n.parquet'}",
    )
    assert result.returncode == 1 and "found no entry of image 'c'" in result.stderr
    assert not (folder / "n.parquet").exists()


def test_the_truth_as_a_table_is_every_single_object_with_score_1(folder):
    result = run(
        "truth_table",
        f"--dataset={folder / 'set'}",
        "--split=validation",
        f"--output={folder / 't.parquet'}",
    )
    assert result.returncode == 0, result.stderr
    found = read_detections(folder / "t.parquet")
    assert list(found.image_ids) == ["a", "b"] and found.scores.tolist() == [1, 1]
    assert sorted(found.boxes.tolist()) == BOXES[:2].tolist()
