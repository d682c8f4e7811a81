"""What is written into a dataset directory is what comes out, and broken directories say so."""

import json

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError


def _write(directory, **options):
    with DatasetWriter(
        directory, "toy", ["/m/a", "/m/b"], ["Mouse", "Mouse"], None, "/photos", **options
    ) as writer:
        first = writer.add_image(
            "b",
            "x/b.jpg",
            (10, 20),
            [[0, 0, 0.5, 1], [0.1, 0.2, 0.3, 0.4]],
            [1, 0],
            flags=[GROUP_OF, 0],
            label_classes=[0, 1],
            label_confidences=[0, 1],
        )
        second = writer.add_image("ä", "ä.jpg")
        third = writer.add_image("c", "c.png", (5, 6), [[0, 0, 1, 1]], [1])
        writer.add_split("train", [third, first])
        writer.add_split("validation", [second])
    return directory


def test_what_was_written_is_read_back(tmp_path):
    dataset = Dataset.open(_write(tmp_path / "d"))
    assert (dataset.num_images, dataset.num_classes) == (3, 2)
    assert dataset.class_labels == ["/m/a", "/m/b"]
    assert dataset.class_names == ["Mouse", "Mouse"]
    assert [dataset.image_id(i) for i in range(3)] == ["b", "ä", "c"]
    assert dataset.image_file(1) == "/photos/ä.jpg"
    assert dataset.splits == ["train", "validation"]
    assert dataset.split("train").tolist() == [2, 0]
    boxes, classes, flags = dataset.image_boxes(0)
    np.testing.assert_array_equal(boxes, np.float32([[0, 0, 0.5, 1], [0.1, 0.2, 0.3, 0.4]]))
    assert classes.tolist() == [1, 0] and flags.tolist() == [GROUP_OF, 0]
    assert [a.tolist() for a in dataset.image_labels(0)] == [[0, 1], [0, 1]]
    assert len(dataset.image_boxes(1)[0]) == 0
    assert dataset.image_boxes(2)[1].tolist() == [1]
    assert [node["LabelName"] for node in dataset.hierarchy["Subcategory"]] == ["/m/a", "/m/b"]


def test_the_arrays_are_memory_maps(tmp_path):
    dataset = Dataset.open(_write(tmp_path / "d"))
    for array in (dataset.boxes, dataset.image_ids):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_images_are_found_by_id(tmp_path):
    dataset = Dataset.open(_write(tmp_path / "d"))
    found = dataset.find_images(["c", "nothing of that length", "b", "", "ä"])
    assert found.tolist() == [2, -1, 0, -1, 1]


def test_masks_come_back_as_they_were_given(tmp_path):
    polygon, rle = [[0.0, 0, 4, 0, 4, 4]], {"size": [4, 4], "counts": "04L0"}
    with DatasetWriter(
        tmp_path / "d", "toy", ["a"], ["a"], None, has_masks=True, extra={"mask_root": "/masks"}
    ) as writer:
        writer.add_image(
            "1", "1.jpg", boxes=[[0, 0, 1, 1]] * 3, classes=[0] * 3, masks=[polygon, None, rle]
        )
        writer.add_image("2", "2.jpg", boxes=[[0, 0, 1, 1]], classes=[0], masks=[{"png": "x.png"}])
        writer.add_image("3", "3.jpg", boxes=[[0, 0, 1, 1]], classes=[0])
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.image_masks(0) == [polygon, None, rle]
    assert dataset.image_masks(1) == [{"png": "/masks/x.png"}]
    assert dataset.image_masks(2) == [None]


def test_ignore_boxes_come_back_and_sets_without_them_have_none(tmp_path):
    with DatasetWriter(tmp_path / "d", "toy", ["a"], ["a"], None, has_ignore=True) as writer:
        writer.add_image("1", "1.jpg", boxes=[[0, 0, 1, 1]], classes=[0])
        writer.add_image("2", "2.jpg", ignore=[[0, 0, 0.5, 1], [0.25, 0, 1, 1]])
        writer.add_image("3", "3.jpg", ignore=[[0, 0.5, 1, 1]])
    dataset = Dataset.open(tmp_path / "d")
    assert [dataset.image_ignore_boxes(i).tolist() for i in range(3)] == [
        [],
        [[0, 0, 0.5, 1], [0.25, 0, 1, 1]],
        [[0, 0.5, 1, 1]],
    ]
    assert Dataset.open(_write(tmp_path / "without")).image_ignore_boxes(0).shape == (0, 4)


def test_directories_of_before_the_ignore_boxes_still_open(tmp_path):
    directory = _write(tmp_path / "d")
    meta = json.loads((directory / "dataset.json").read_text())
    del meta["has_ignore"]
    (directory / "dataset.json").write_text(json.dumps(meta))
    assert Dataset.open(directory).image_ignore_boxes(0).shape == (0, 4)


def test_photos_without_a_recorded_root_lie_in_the_dataset_directory(tmp_path):
    with DatasetWriter(tmp_path / "d", "toy", ["a"], ["a"], None) as writer:
        writer.add_image("1", "images/1.jpg")
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.image_file(0) == str(tmp_path / "d" / "images" / "1.jpg")
    moved = Dataset.open(tmp_path / "d", image_root="gs://bucket/photos")
    assert moved.image_file(0) == "gs://bucket/photos/images/1.jpg"


def test_nothing_is_left_after_a_failure(tmp_path):
    with (
        pytest.raises(RuntimeError),
        DatasetWriter(tmp_path / "d", "toy", ["a"], ["a"], None) as writer,
    ):
        writer.add_image("1", "1.jpg")
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_replaced_only_on_demand(tmp_path):
    _write(tmp_path / "d")
    with pytest.raises(UserError, match="exists"):
        _write(tmp_path / "d")
    _write(tmp_path / "d", overwrite=True)
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="no dataset directory"):
        _write(tmp_path / "precious", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "precious"]


def test_user_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is no dataset directory"):
        Dataset.open(tmp_path / "nowhere")
    directory = _write(tmp_path / "d")
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        Dataset.open(directory).split("test")
    boxes = directory / "index" / "boxes.npy"
    boxes.write_bytes(boxes.read_bytes()[:140])
    with pytest.raises(UserError, match="boxes.npy"):
        Dataset.open(directory)
    meta = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps(meta | {"format": 7}))
    with pytest.raises(UserError, match="format is 7"):
        Dataset.open(directory)


def test_two_images_of_one_id_are_refused(tmp_path):
    with (
        pytest.raises(UserError, match="image id 'x'"),
        DatasetWriter(tmp_path / "d", "toy", ["a"], ["a"], None) as writer,
    ):
        writer.add_image("x", "1.jpg")
        writer.add_image("x", "2.jpg")
    assert not (tmp_path / "d").exists()
