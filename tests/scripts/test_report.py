"""scripts.report: one page that holds the figures, stands alone and survives odd input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.metrics.openimages import CLASS_AP, MEAN_AP, evaluate_openimages
from common.tables import DetectionsReader, DetectionsWriter
from scripts.report import report
from tests.pages import Page

ROOT = Path(__file__).parents[2]
NAMES = ["Tree", '</script><b>Oak & "elm"</b>', "Dog"]
LABELS = ["/m/tree", "/m/oak", "/m/dog"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {"LabelName": "/m/tree", "Subcategory": [{"LabelName": "/m/oak"}]},
        {"LabelName": "/m/dog"},
    ],
}
LEFT, RIGHT = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "set", "trees", LABELS, NAMES, HIERARCHY, str(photos)) as writer:
        for image_id in ("a", "b", "c"):
            pixels = rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(photos / f"{image_id}.png")
            writer.add_image(
                image_id, f"{image_id}.png", (60, 90), [LEFT, RIGHT], [1, 2],
                label_classes=[0, 1, 2], label_confidences=[1, 1, 1],
            )  # fmt: skip
        writer.add_split("val", [0, 1, 2])
        writer.add_split("train", [0])
    with DetectionsWriter(folder / "one.parquet", {"model": "<i>m</i>", "step": 7}) as writer:
        writer.add("a", ["/m/oak", "/m/dog"], [0.9, 0.8], [LEFT, RIGHT])
        writer.add("b", ["/m/dog"], [0.7], [LEFT])
        writer.add("c", [], [], np.zeros((0, 4)))
    with DetectionsWriter(folder / "two.parquet", {"model": "m"}) as writer:
        for image_id in ("a", "b", "c"):
            writer.add(image_id, ["/m/dog", "/m/tree"], [0.9, 0.4], [RIGHT, LEFT])
    return folder


def build(folder, *names, **options):
    readers = [DetectionsReader(folder / f"{name}.parquet") for name in names]
    dataset = Dataset.open(folder / "set")
    output = folder / "page.html"
    return report(dataset, "val", readers, list(names), output, **options).read_text()


def test_figures_are_those_of_the_metric_side_by_side(folder):
    text = build(folder, "one", "two")
    page = Page(text)
    dataset = Dataset.open(folder / "set")
    for column, name in enumerate(("one", "two")):
        results = evaluate_openimages(dataset, "val", folder / f"{name}.parquet")
        assert f">{results[MEAN_AP.format(0.5)]:.4f}</td>" in text
        for index, label in enumerate(LABELS):
            shown = page.rows[f"class-{index}"]
            assert shown[0] == NAMES[index]
            assert shown[1:3] == ["1", "3"]  # boxes in train, in val
            assert float(shown[3 + column]) == pytest.approx(
                results[CLASS_AP.format(0.5, label)], abs=1e-6
            )
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data["tables"] == ["one", "two"] and data["names"] == NAMES
    dog = data["classes"]["2"]
    assert dog["truth"] == 3
    one, two = dog["tables"]
    assert (one["found"], one["wrong"], two["found"], two["wrong"]) == (1, 0, 3, 0)
    assert two["curve"] == [1000] * 101
    # The dog on an oak scores below its class's best F1: seen with all detections judged.
    data = json.loads(
        re.search(r'id="data">(.*?)</script>', build(folder, "one", min_score=0.0)).group(1)
    )
    assert data["classes"]["2"]["tables"][0]["reallyIs"] == [[1, 1]]
    assert data["classes"]["1"]["tables"][0]["takenFor"] == [[2, 1]]


def test_the_page_stands_alone_and_escapes_names(folder):
    text = build(folder, "one", min_score=0.0)
    page = Page(text)
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= page.ids
    assert "<b>Oak" not in text and "<i>m</i>" not in text
    assert "&lt;b&gt;Oak &amp; &quot;elm&quot;" in text
    assert text.count("<script") == 3 and "default-src 'none'" in text
    assert "expand_predictions" in text  # Tree has no copies of the oaks
    assert "expand_predictions" not in build(folder, "one", expand_predictions=True)


def test_pictures_are_bounded_and_show_truth_and_detections(folder):
    text = build(folder, "one", "two", max_pictures=2, min_score=0.0)
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.count('class="layer') == 4
    assert "<title>Dog 0.70, is &lt;/script&gt;" in text
    assert build(folder, "one", max_pictures=0).count("data:image/jpeg") == 0


def test_without_a_training_split_rarity_is_that_of_the_scored_one(folder):
    assert "boxes in val of the class" in build(folder, "one", train_split="nothing")


def test_missing_photos_are_one_line_and_their_boxes_are_drawn(folder, capsys):
    photo = folder / "photos" / "b.png"
    hidden = photo.rename(folder / "hidden.png")
    try:
        text = build(folder, "one", min_score=0.0)
    finally:
        hidden.rename(photo)
    notes = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert len(notes) == 1
    assert "1 of 3 photos cannot be read" in notes[0] and "b.png: No such file" in notes[0]
    assert text.count("data:image/jpeg") == 2 and text.count("photo cannot be read") == 1
    assert text.count('class="layer') == 3


def test_the_command_and_its_errors_in_one_line(folder):
    def command(*args):
        base = [f"--dataset={folder / 'set'}", "--split=val", f"--output={folder / 'x.html'}"]
        return subprocess.run(
            [sys.executable, "-m", "scripts.report", *base, *args],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip

    tables = f"--detections={folder / 'one.parquet'},{folder / 'two.parquet'}"
    result = command(tables)
    assert result.returncode == 0, result.stderr
    assert "x.html" in result.stdout and (folder / "x.html").stat().st_size > 10_000
    (folder / "x.html").unlink()
    for args, message in [
        ([f"--detections={folder / 'one.parquet'},nothing.parquet"], "nothing.parquet: no such"),
        ([tables, "--names=a"], "--names=a: expected 2 different names"),
        ([tables, f"--output={folder}"], "cannot write, expected the name of an HTML file"),
    ]:
        result = command(*args)
        assert result.returncode == 1
        assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
        assert not (folder / "x.html").exists()
