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


def test_an_absent_class_that_is_annotated_is_counted(tmp_path):
    """The annotation is the better evidence."""
    source = write(tmp_path / "lvis_val.json")
    content = json.loads(source.read_text())
    content["images"][0]["neg_category_ids"] = [2, 5]
    source.write_text(json.dumps(content))
    dataset = prepare("lvis", source=source, output=tmp_path / "d")
    classes, confidences = dataset.image_labels(int(dataset.find_images(["42"])[0]))
    assert sorted(zip(classes.tolist(), confidences.tolist(), strict=True)) == [
        (0, ABSENT),
        (1, NOT_EXHAUSTIVE),
    ]
    reason = "category listed as absent where it is annotated"
    (entry,) = json.loads((dataset.directory / "report.json").read_text())
    assert (entry["reason"], entry["count"], entry["examples"][0]["row"]) == (reason, 1, 42)
    with pytest.raises(UserError, match=f"lvis_val.json, row 42: {reason}; --strict refuses it"):
        prepare("lvis", source=source, strict=True, output=tmp_path / "e")


def _coco_file(path, images, annotations):
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    path.write_text(json.dumps(content))
    return path


def test_boxes_of_coco_become_ignore_boxes(tmp_path, capsys):
    """Crowds and objects alike, by file name before id; foreign photos are counted."""
    source = write(tmp_path / "lvis_v1_val.json")
    images = [
        {"id": 42, "file_name": "000000000043.jpg", "height": 9, "width": 9},
        {"id": 7, "file_name": "000000000042.jpg", "height": 200, "width": 400},
        {"id": 8, "file_name": "000000000008.jpg", "height": 200, "width": 400},
    ]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [40, 20, 200, 100], "iscrowd": 1},
        {"id": 2, "image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 400, 20]},
        {"id": 4, "image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 20]},
    ]
    other = _coco_file(tmp_path / "instances.json", images, annotations)
    dataset = prepare("lvis", source=source, ignore=[str(other)], output=tmp_path / "d")
    image, empty = dataset.find_images(["42", "43"])
    expected = np.float32([[0.1, 0.1, 0.6, 0.6], [0, 0, 1, 0.1]])
    np.testing.assert_allclose(dataset.image_ignore_boxes(image), expected, rtol=1e-6)
    assert len(dataset.image_ignore_boxes(empty)) == 0
    assert len(dataset.boxes) == 1
    printed = capsys.readouterr().out
    assert "2 ignore boxes on 2 of 2 images; 1 of its images are not in the set" in printed


def test_ignore_files_of_other_photos_are_refused(tmp_path):
    source = write(tmp_path / "lvis_v1_val.json")
    stranger = {"id": 5, "file_name": "z.jpg", "height": 9, "width": 9}
    other = _coco_file(tmp_path / "other.json", [stranger], [])
    with pytest.raises(UserError, match="other.json: none of its 1 images is in the set"):
        prepare("lvis", source=source, ignore=[str(other)], output=tmp_path / "d")
    # Another data set may number its photos alike.
    namesake = {"id": 42, "file_name": "z.jpg", "height": 200, "width": 100}
    other = _coco_file(tmp_path / "other.json", [namesake], [])
    with pytest.raises(UserError, match="another shape than the photos of the set"):
        prepare("lvis", source=source, ignore=[str(other)], output=tmp_path / "d")
    assert not (tmp_path / "d").exists()
