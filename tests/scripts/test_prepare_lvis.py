"""LVIS files become a dataset that keeps what LVIS checked, and how often its classes occur."""

import json

import numpy as np
import pytest

from common.data.dataset import ABSENT, NOT_EXHAUSTIVE, Dataset
from common.io.errors import UserError
from tests.prepare_data_cli import prepare, reasons, write_photo


def write(path, *, images=None, categories=None):
    content = {
        "images": images
        or [
            {
                "id": 42,
                "file_name": "COCO_val2014_000000000042.jpg",
                "coco_url": "http://images.cocodataset.org/val2017/000000000042.jpg",
                "height": 100,
                "width": 200,
                "neg_category_ids": [2, 99],
                "not_exhaustive_category_ids": [5],
            },
            {"id": 43, "coco_url": "http://x/train2017/000000000043.jpg", "height": 9, "width": 9},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 42,
                "category_id": 5,
                "bbox": [20, 10, 100, 50],
                "segmentation": [[20, 10, 120, 10, 120, 60]],
                "area": 2500.0,
            }
        ],
        "categories": categories
        or [
            {"id": 2, "name": "ant", "frequency": "r", "image_count": 1},
            {"id": 5, "name": "bee", "frequency": "f", "image_count": 100},
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_what_lvis_checked_is_kept(tmp_path):
    write(tmp_path / "lvis_v1_val.json")
    (tmp_path / "lvis_v1_categories.json").write_text("[]")
    for name in ("val2017/000000000042.jpg", "train2017/000000000043.jpg"):
        write_photo(tmp_path / "photos" / name, 100, 200)
    dataset = prepare("lvis", source=tmp_path, images=tmp_path / "photos", output=tmp_path / "d")
    assert dataset.splits == ["val"]
    assert dataset.class_labels == ["ant", "bee"]
    assert dataset.meta["category_ids"] == [2, 5]
    assert dataset.meta["frequency"] == ["r", "f"]
    assert dataset.meta["exhaustive"] is False
    image = int(dataset.find_images(["42"])[0])
    assert dataset.image_file(image).endswith("val2017/000000000042.jpg")
    classes, confidences = dataset.image_labels(image)
    assert dict(zip(classes.tolist(), confidences.tolist(), strict=True)) == {
        0: ABSENT,
        1: NOT_EXHAUSTIVE,
    }
    assert dataset.image_masks(image) == [[[20, 10, 120, 10, 120, 60]]]
    np.testing.assert_allclose(dataset.box_areas[0] * 100 * 200, 2500)
    assert reasons(dataset)["image label of unknown class"] == 1


def test_older_dataset_directories_open(tmp_path):
    """Without areas, frequencies and the fields that speak of them."""
    dataset = prepare("lvis", source=write(tmp_path / "lvis_val.json"), output=tmp_path / "d")
    meta = json.loads((dataset.directory / "dataset.json").read_text())
    for key in ("has_areas", "frequency", "category_ids"):
        del meta[key]
    (dataset.directory / "dataset.json").write_text(json.dumps(meta))
    (dataset.directory / "index" / "box_area.npy").unlink()
    assert Dataset.open(dataset.directory).box_areas is None


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"id": 5, "name": "bee"}, "categories number 1 has no field 'frequency'"),
        ({"id": 5, "name": "bee", "frequency": "x"}, "frequency 'x', expected 'r', 'c' or 'f'"),
    ],
)
def test_categories_need_a_frequency(tmp_path, category, message):
    source = write(tmp_path / "lvis_val.json", categories=[category])
    with pytest.raises(UserError, match=message):
        prepare("lvis", source=source, output=tmp_path / "d")
