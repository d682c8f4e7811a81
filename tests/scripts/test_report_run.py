"""scripts.report_run: one page about a training, that stands alone."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import DatasetWriter
from common.data.model_classes import write_model_classes
from common.io.errors import UserError
from common.tables import DetectionsWriter
from scripts.report_run import report_run
from tests import tiny
from tests.pages import Page

BOX, OTHER = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
CLASS_AP = "PerformanceByCategory/AP/{}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    Image.fromarray(np.full((60, 90, 3), 90, np.uint8)).save(folder / "a.png")
    names = ["Cat", "<b>Dog"]
    tree = {"LabelName": "root", "Subcategory": [{"LabelName": "cat"}, {"LabelName": "dog"}]}
    with DatasetWriter(folder / "set", "pets", ["cat", "dog"], names, tree, str(folder)) as writer:
        writer.add_image("a", "a.png", (60, 90), [BOX, OTHER], [0, 1])
        writer.add_split("train", [0])
        writer.add_split("val", [0])
    work = folder / "work"
    work.mkdir()
    config = {"name": "tiny", "data": {"dir": str(folder / "set"), "train_split": "train"}}
    (work / "config.json").write_text(json.dumps(config))
    write_model_classes(work, ["cat", "dog"], names, tree)
    lines = [
        {"step": s, "loss": 3.0 / s, "loss/mask": 1.0, "learning_rate": 0.1, "proposal_recall": 0.5}
        for s in range(1, 41)
    ]
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    goodput = {"seconds": {"init": 36.0, "steps": 324.0, "lost": 0.0}, "starts": 2}
    (work / "goodput.json").write_text(json.dumps(goodput))
    for step, value in ((20, 0.25), (40, 0.5)):
        place = work / "evaluation" / str(step)
        place.mkdir(parents=True)
        figures = {"AP": value, CLASS_AP.format("cat"): value, CLASS_AP.format("dog"): 0.75}
        (place / "val_metrics.json").write_text(json.dumps(figures))
        with DetectionsWriter(place / "val.parquet", {"model": "m"}) as writer:
            writer.add("a", ["cat", "dog"], [0.9, value], [BOX, BOX])
    return work


def test_the_page_holds_curves_classes_and_pictures(run):
    text = report_run(run)
    page = Page(text)
    assert {"losses", "training", "evaluations", "classes", "pictures"} <= page.ids
    assert not [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert "<b>Dog" not in text
    rows = [row for row in page.rows.values() if row and row[0] == "Cat"]
    assert [row[1:] for row in rows] == [["1", "0.250000", "0.500000", "0.500000", "0.000000"]]
    assert "0.10 h, started 2 times: steps 90%, init 10%" in text
    # At step 20 the dog scores too little to be drawn; at step 40 it is, on the cat.
    assert text.count("&lt;b&gt;Dog 0.50") == 2 and "Dog 0.25" not in text
    assert text.count('class="box correct"') == 2 and text.count('class="box background"') == 1


def test_a_run_whose_dataset_is_elsewhere_has_a_page_too(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["dir"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(config))
    page = Page(report_run(moved))
    assert "classes" in page.ids and "pictures" not in page.ids
    assert "cannot be opened" in capsys.readouterr().out


def test_photos_as_training_is_fed_with_them_are_on_the_page(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copy")
    config = tiny.get_config()
    config.data.dir = json.loads((run / "config.json").read_text())["data"]["dir"]
    (copied / "config.json").write_text(config.to_json())
    page = Page(report_run(copied, max_pictures=2))
    assert "fed" in page.ids and "fed" not in Page(report_run(run)).ids
    assert sum(address.startswith("data:image/jpeg") for address in page.addresses) == 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected the work directory of a run"):
        report_run(tmp_path)
