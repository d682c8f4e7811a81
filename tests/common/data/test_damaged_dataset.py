"""Dataset directories that were edited or damaged: told at opening, by file and field."""

import json

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    with DatasetWriter(path, "x", ["a", "b"], ["A", "B"], None, has_masks=True) as writer:
        for number in range(3):
            boxes, masks = [[0.1, 0.1, 0.5, 0.5]], [[[1, 1, 9, 1, 9, 9]]]
            writer.add_image(f"{number}", f"{number}.jpg", (9, 9), boxes, [1], masks=masks)
        writer.add_split("train", [0, 1, 2])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": None}, "field num_images is None"),
        ({"num_boxes": "3"}, "field num_boxes is '3'"),
        ({"num_classes": 10**400}, "field num_classes is 1000"),
        ({"image_root": 5}, "field image_root is 5"),
        ({"name": "a\0b"}, "field name is"),
        ({"has_masks": "yes"}, "field has_masks is 'yes'"),
        ({"category_ids": [1]}, "field category_ids: expected a list of one entry a class"),
        ({"num_classes": 3}, "classes.csv: 2 different labels in 2 rows, .* 3 classes"),
        ({"num_images": 4}, "3 rows, dataset.json says 4"),
    ],
)
def test_fields_of_the_description(folder, changes, message):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        Dataset.open(folder)


@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"format": 1e400}', "[" * 100_000, "\xff"])
def test_a_description_that_is_none(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="dataset.json: ") as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("boxes", np.zeros((3, 5), np.float32), "found float32 of shape .3, 5., expected float32"),
        ("boxes", np.zeros((3, 4), np.float64), "found float64 of shape"),
        ("boxes", np.zeros((3, 4), ">f4"), "found >f4 of shape"),
        ("box_class", np.array([0, 1, 2], np.int32), "found 0 to 2, expected 0 to 1"),
        ("box_class", np.array([0, -1, 1], np.int32), "found -1 to 1"),
        ("box_offsets", np.array([0, 2, 1, 3]), "offsets that fall"),
        ("box_offsets", np.array([0, 1, 2, 9]), "ends with 9, dataset.json says 3 boxes"),
        ("box_offsets", np.array([1, 1, 2, 3]), "offsets that fall"),
        ("mask_offsets", np.array([0, 1, 2, 1 << 60]), "masks.bin: .* bytes, expected 1152921504"),
        ("image_id_order", np.array([0, 1, 3], np.int32), "found 0 to 3, expected 0 to 2"),
        ("image_size", -np.ones((3, 2), np.int32), "found a side of -1"),
        ("image_path", np.array([b"\xff"] * 3), "bytes that are not UTF-8"),
        ("image_id", np.zeros(3, np.int64), "expected byte strings"),
        ("image_id", np.array(["x", {}, 3], object), "image_id.npy: broken or missing index file"),
    ],
)
def test_arrays_of_the_index(folder, name, array, message):
    np.save(folder / "index" / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=f"{name}.npy: .*{message}|{message}"):
        Dataset.open(folder)


@pytest.mark.parametrize("array", [[0, 7], [-1], [[0, 1]], [0.5], ["a"], [{}]])
def test_splits(folder, array):
    kind = object if isinstance(array[0], dict) else None
    np.save(folder / "splits" / "train.npy", np.array(array, kind), allow_pickle=True)
    with pytest.raises(UserError, match="train.npy: "):
        Dataset.open(folder).split("train")
    (folder / "splits" / "train.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(UserError, match="train.npy: broken or missing split"):
        Dataset.open(folder).split("train")


@pytest.mark.parametrize("tree", [[], {}, {"LabelName": "r", "Subcategory": [{"LabelName": [1]}]}])
def test_hierarchies(folder, tree):
    (folder / "hierarchy.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match='hierarchy.json: a node without "LabelName"'):
        Dataset.open(folder)


def test_texts_of_masks(folder):
    (folder / "masks.bin").write_bytes(b"{" * (folder / "masks.bin").stat().st_size)
    with pytest.raises(UserError, match="masks.bin: image '0': no valid JSON"):
        Dataset.open(folder).image_masks(0)
