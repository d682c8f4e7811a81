"""scripts.submit and scripts.import_detections on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import DatasetWriter
from common.tables import DetectionsWriter, read_detections

ROOT = Path(__file__).parents[2]


def run(script, *args):
    command = [sys.executable, "-m", f"scripts.{script}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset as prepare_data makes it of COCO files, and a table of its validation split."""
    folder = tmp_path_factory.mktemp("submit")
    labels, extra = ["cat", "dog"], {"category_ids": [17, 18], "frequency": ["r", "f"]}
    with DatasetWriter(folder / "set", "pets", labels, labels, None, extra=extra) as writer:
        for image in (7, 9, 12):
            writer.add_image(str(image), "x.jpg", (100, 200), [[0, 0, 0.5, 0.5]], [1])
        writer.add_split("val", [0, 1])
    rng = np.random.default_rng(0)
    with DetectionsWriter(folder / "x.parquet", {"model": "m"}) as writer:
        for image in (7, 12):
            corners = np.sort(rng.random((6, 2, 2)), axis=1).reshape(6, 4).astype(np.float32)
            writer.add(str(image), ["cat", "dog"] * 3, np.linspace(0.9, 0.1, 6), corners)
        writer.add("9", [], [], [])
    return folder


@pytest.mark.parametrize("form", ["openimages", "lvis"])
def test_there_and_back(folder, form):
    """The images of a split leave and come back as they were; the rest stays behind."""
    where = (f"--format={form}", f"--dataset={folder / 'set'}", "--split=val")
    output, back = folder / f"{form}.out", folder / f"{form}.parquet"
    result = run("submit", *where, f"--detections={folder / 'x.parquet'}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert "6 detections of 2 images" in result.stdout
    assert ("expanded to parent classes" in result.stdout) is (form == "openimages")
    if form == "lvis":
        rows = json.loads(output.read_text())
        assert {row["image_id"] for row in rows} == {7}
        assert [row["category_id"] for row in rows] == [17, 18] * 3
    result = run("import_detections", *where, f"--input={output}", f"--output={back}")
    assert result.returncode == 0, result.stderr
    found, written = read_detections(back), read_detections(folder / "x.parquet")
    assert found.image_ids == ["7", "9"]
    first = written.take(written.image_index == written.image_ids.index("7"))
    np.testing.assert_array_equal(found.boxes, first.boxes)
    np.testing.assert_array_equal(found.scores, first.scores)
    assert found.metadata == {
        "model": form,
        "dataset": "pets",
        "split": "val",
        "imported": {"file": output.name, "format": form},
    }


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("submit", ["--format=coco"], "--format=coco needs numbers of images and categories"),
        ("submit", ["--format=openimages_masks"], "x.parquet: no mask column"),
        ("submit", ["--format=openimages", "--split=val"], "--split needs --dataset"),
        ("import_detections", ["--format=openimages"], "x.parquet: row 1 is not UTF-8"),
    ],
)
def test_user_errors_are_one_line(folder, script, flags, message):
    name = "detections" if script == "submit" else "input"
    output = folder / "never"
    result = run(script, f"--{name}={folder / 'x.parquet'}", f"--output={output}", *flags)
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()
