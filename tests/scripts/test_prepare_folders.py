"""Folders of photos by class become boxes of whole photos, or one line says what is wrong."""

import numpy as np
import pytest

from common.data.input import train_batches
from common.data.plans.plan import train_plan
from common.data.settings import ElaborateSettings, SourceSettings
from common.io.errors import UserError
from tests.common.data.factories import data_settings
from tests.prepare_data_cli import openimages_source, prepare, reasons, write_photo


def test_each_photo_has_a_box_of_its_class(tmp_path):
    for name in ("torch/1.jpg", "torch/2.png", "lamp/1.jpg", "lamp/1.png"):
        write_photo(tmp_path / "s" / name, 20, 30)
    (tmp_path / "s" / "torch" / "notes.txt").write_text("not a photo")
    dataset = prepare("folders", source=tmp_path / "s", output=tmp_path / "d")
    assert dataset.class_labels == ["lamp", "torch"]
    ids = [dataset.image_id(i) for i in range(dataset.num_images)]
    assert sorted(ids) == ["lamp/1", "lamp/1.png", "torch/1", "torch/2"]
    for index, name in enumerate(ids):
        boxes, classes, flags = dataset.image_boxes(index)
        assert boxes.tolist() == [[0, 0, 1, 1]] and flags.tolist() == [0]
        assert dataset.class_labels[classes[0]] == name.split("/")[0]
        assert [a.tolist() for a in dataset.image_labels(index)] == [classes.tolist(), [1]]
    assert (dataset.image_sizes == (20, 30)).all()
    assert dataset.splits == ["train"] and reasons(dataset) == {}


def test_folders_of_splits_and_names_of_a_class_list(tmp_path):
    for name in ("train/Torch/1.jpg", "val/Torch/2.jpg", "val/b/3.jpg"):
        write_photo(tmp_path / "s" / name, 20, 30)
    classes = tmp_path / "classes.csv"
    classes.write_text("label,name\na,Torch\nb,Lamp\nc,Sword\n")
    dataset = prepare("folders", source=tmp_path / "s", classes=classes, output=tmp_path / "d")
    assert dataset.class_labels == ["a", "b", "c"] and dataset.splits == ["train", "val"]
    assert [dataset.image_boxes(i)[1].tolist() for i in dataset.split("val")] == [[0], [1]]
    assert reasons(dataset) == {"class without a photo": 1}


@pytest.mark.parametrize(
    ("photos", "classes", "message"),
    [
        ([], None, "no photos below it, expected CLASS/PHOTO"),
        (["a/1.jpg", "2.jpg"], None, "found '2.jpg' and 'a/1.jpg', expected all photos as CLASS"),
        (["torches/1.jpg"], "a,Torch\n", "folder 'torches' is no class of the list, expected a l"),
        (["X/1.jpg"], "a,X\nb,X\n", "folder 'X' is the name of 2 classes of the list"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, photos, classes, message):
    (tmp_path / "s").mkdir()
    for name in photos:
        write_photo(tmp_path / "s" / name, 20, 30)
    values = {}
    if classes:
        (tmp_path / "classes.csv").write_text(classes)
        values = {"classes": tmp_path / "classes.csv"}
    with pytest.raises(UserError, match=message):
        prepare("folders", source=tmp_path / "s", output=tmp_path / "d", **values)


def test_they_are_a_source_of_boxes_beside_others(tmp_path):
    """And one whole photo is cropped around its box, which is all of it."""
    source = openimages_source(tmp_path / "s", ["x,/m/c,0,0.5,0,0.5,0"])
    write_photo(tmp_path / "photos" / "x.jpg", 40, 60)
    run = prepare("openimages", source=source, images=tmp_path / "photos", output=tmp_path / "d")
    write_photo(tmp_path / "folders" / "Cat" / "1.jpg", 50, 30)
    classes = tmp_path / "classes.csv"
    classes.write_text("/m/c,Cat\n")
    folders = prepare(
        "folders", source=tmp_path / "folders", classes=classes, output=tmp_path / "f"
    )
    data = data_settings(
        sources=(SourceSettings(dir=""), SourceSettings(dir=str(folders.directory))),
        sampler="class_aware",
        scale_jitter=(1.0, 1.0),
        flip=False,
        elaborate=ElaborateSettings(scale="crop", rotate=False, boxes="hull", max_zoom=4.0),
    )
    plan = train_plan(run, data, 0)
    (batch,) = train_batches(run, plan, data, seed=0, num_steps=1)
    theirs = np.flatnonzero(batch["source"] == 1)
    assert len(theirs) == 3
    for slot in theirs:
        assert batch["gt_valid"][slot].sum() == 1 and batch["gt_classes"][slot, 0] == 2
        height, width = batch["image_size"][slot]
        assert batch["gt_boxes"][slot, 0].tolist() == [0, 0, width, height]
