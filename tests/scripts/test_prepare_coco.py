"""COCO and Objects365 files become a dataset that holds what they say."""

import json

import numpy as np
import pytest

from common.data.dataset import CROWD, DEPICTION, GROUP_OF
from common.io.errors import UserError
from common.metrics.coco import evaluate_coco
from common.tables import DetectionsWriter
from tests.prepare_data_cli import prepare, reasons, write_photo

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def _annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


def _write(path, annotations, *, images=((1, "a.jpg"), (2, "b.jpg")), categories=None, **more):
    document = {
        "images": [{"id": i, "file_name": name, "height": 100, "width": 200} for i, name in images],
        "annotations": annotations,
        "categories": categories or CATEGORIES,  # after the annotations, as in the official files
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_boxes_classes_and_splits(tmp_path):
    train = [
        _annotation(11, 2, 3, [20, 10, 100, 50], iscrowd=1),
        _annotation(12, 1, 7, [0, 0, 200, 100]),
        _annotation(13, 2, 7, [0, 0, 1, 1]),
    ]
    _write(tmp_path / "s" / "instances_train2017.json", train)
    _write(tmp_path / "s" / "boxes_val_a.json", [], images=[(5, "e.jpg")])
    _write(tmp_path / "s" / "captions_train2017.json", [])
    dataset = prepare("coco", source=tmp_path / "s", output=tmp_path / "d")
    assert dataset.class_labels == ["dog", "cat"]  # by id, wherever they are in the list
    assert dataset.meta["category_ids"] == [3, 7]
    assert dataset.meta["exhaustive"] is True
    assert dataset.splits == ["train2017", "val_a"]
    assert [dataset.image_id(i) for i in dataset.split("train2017")] == ["1", "2"]
    assert [dataset.image_id(i) for i in dataset.split("val_a")] == ["5"]
    first, second, other = dataset.find_images(["1", "2", "5"])
    boxes, classes, flags = dataset.image_boxes(second)
    np.testing.assert_allclose(boxes, [[0.1, 0.1, 0.6, 0.6], [0, 0, 0.005, 0.01]], rtol=1e-6)
    assert classes.tolist() == [0, 1] and flags.tolist() == [CROWD | GROUP_OF, 0]
    assert dataset.image_sizes.tolist() == [[100, 200]] * 3
    assert len(dataset.image_boxes(first)[0]) == 1 and len(dataset.image_boxes(other)[0]) == 0
    assert reasons(dataset) == {}


def test_polygons_and_rle_are_kept(tmp_path):
    polygon, rle = [[1.5, 2, 30, 2, 30, 40.25]], {"size": [100, 200], "counts": [0, 20000]}
    annotations = [
        _annotation(1, 2, 7, [0, 0, 50, 50], segmentation=polygon),
        _annotation(2, 1, 7, [0, 0, 50, 50]),
        _annotation(3, 2, 3, [0, 0, 50, 50], segmentation=rle, iscrowd=1),
    ]
    source = _write(tmp_path / "instances_x.json", annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert dataset.image_masks(0) == [None]
    assert dataset.image_masks(1) == [polygon, rle]


def test_photos_are_found_by_file_name(tmp_path):
    images = [(1, "train2017/a.jpg"), (2, "b.jpg")]
    source = _write(tmp_path / "x.json", [_annotation(1, 1, 7, [0, 0, 50, 50])], images=images)
    write_photo(tmp_path / "p" / "val2017" / "a.jpg", 10, 10)
    write_photo(tmp_path / "p" / "train2017" / "a.jpg", 100, 200)
    write_photo(tmp_path / "p" / "train2017" / "b.jpg", 50, 100)
    dataset = prepare("coco", source=source, images=tmp_path / "p", output=tmp_path / "d")
    assert dataset.image_file(0) == str(tmp_path / "p" / "train2017" / "a.jpg")
    # The photo of b has another size than annotated: boxes are fractions, so only noted.
    assert reasons(dataset) == {"size in the annotations is not that of the photo": 1}
    assert dataset.image_sizes.tolist() == [[100, 200], [50, 100]]


def test_annotations_without_meaning_are_counted(tmp_path):
    annotations = [
        _annotation(1, 1, 7, [0, 0, 50, 50]),
        _annotation(2, 99, 7, [0, 0, 50, 50]),
        _annotation(3, 1, 55, [0, 0, 50, 50]),
        _annotation(4, 1, 7, [0, 0, 0, 50]),
        _annotation(5, 1, 7, [150, 0, 100, 50]),
        _annotation(6, 1, 7, [None, 0, 10, 50]),
    ]
    source = _write(tmp_path / "x.json", annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert reasons(dataset) == {
        "unknown image": 1,
        "unknown class": 1,
        "zero area": 1,
        "reaches outside the frame": 1,
        "number missing or not finite": 1,
    }
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    rows = {entry["reason"]: entry["examples"][0]["row"] for entry in report}
    assert rows["unknown image"] == 2 and rows["zero area"] == 4  # annotation ids


def test_objects365_fields(tmp_path):
    images = [(1, "images/v1/patch8/objects365_v1_1.jpg")]
    annotations = [_annotation(1, 1, 1, [0, 0, 50, 50], isfake=1, iscrowd=0)]
    twice = [{"id": 1, "name": "Lamp"}, {"id": 2, "name": "Lamp"}]
    _write(
        tmp_path / "s" / "zhiyuan_objv2_train.json", annotations, images=images, categories=twice
    )
    write_photo(tmp_path / "s" / "patch8" / "objects365_v1_1.jpg", 100, 200)
    dataset = prepare("objects365", source=tmp_path / "s", output=tmp_path / "d")
    assert dataset.splits == ["train"]
    assert dataset.class_labels == ["Lamp (1)", "Lamp (2)"]
    assert dataset.class_names == ["Lamp", "Lamp"]
    assert dataset.box_flags.tolist() == [DEPICTION]
    assert dataset.image_file(0).endswith("s/patch8/objects365_v1_1.jpg")


def test_files_that_number_their_photos_each_from_one(tmp_path):
    _write(tmp_path / "s" / "instances_train.json", [_annotation(1, 1, 7, [0, 0, 50, 50])])
    _write(
        tmp_path / "s" / "instances_val.json",
        [_annotation(1, 1, 3, [0, 0, 50, 50])],
        images=[(1, "c.jpg")],
    )
    with pytest.raises(UserError, match="image id 1 is c.jpg here and a.jpg.*file_stem"):
        prepare("coco", source=tmp_path / "s", output=tmp_path / "d", image_id="id")
    dataset = prepare("coco", source=tmp_path / "s", output=tmp_path / "d")
    assert dataset.meta["image_id"] == "file_stem"
    assert [dataset.image_id(i) for i in range(3)] == ["a", "b", "c"]


_TWENTY = [_annotation(i, 1, 7, [i * 5, i * 2, 40 + i, 40]) for i in range(20)]


def _as_corners(annotations):
    boxes = [a["bbox"] for a in annotations]
    return [
        a | {"bbox": [x, y, x + w, y + h]}
        for a, (x, y, w, h) in zip(annotations, boxes, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": _as_corners(_TWENTY)}, "xmin, ymin, xmax, ymax"),
        ({"annotations": [a | {"bbox": [0.1, 0.1, 0.5, 0.5]} for a in _TWENTY]}, "normalised"),
        (
            {
                "annotations": [_annotation(1, 1, i, [0, 0, 9, 9]) for i in (0, 1)],
                "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
            },
            "off by one",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 7}]},
            "found 1 boxes and none that can be used .1 x number missing",
        ),
        (
            {"annotations": [_annotation(1, 1, "cat", [0, 0, 9, 9])]},
            "none of the category ids .cat",
        ),
        (
            {"annotations": [_annotation(1, 1, 3.5, [0, 0, 9, 9])]},
            "annotations number 1 has a wrong value",
        ),
        ({"annotations": [_annotation(1, 1, 7, [0, 0, 9])]}, "expected \\[x, y, width, height\\]"),
        ({"annotations": [], "images": [(1, "a.jpg"), (1, "b.jpg")]}, "image id 1 is given twice"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, change, message):
    source = _write(tmp_path / "instances_x.json", **change)
    with pytest.raises(UserError, match=f"instances_x.json: .*{message}") as error:
        prepare("coco", source=source, output=tmp_path / "d")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


def test_other_json_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.json").write_text('{"splits": []}')
    with pytest.raises(UserError, match="no 'images'; found splits"):
        prepare("coco", source=tmp_path / "x.json", output=tmp_path / "d")
    with pytest.raises(UserError, match="no JSON file there"):
        prepare("coco", source=tmp_path / "y.json", output=tmp_path / "d")


def test_two_files_of_one_split_are_refused(tmp_path):
    for prefix in ("boxes", "instances"):
        _write(tmp_path / f"{prefix}_train.json", _TWENTY)
    with pytest.raises(UserError, match="both split 'train'; choose files by a pattern"):
        prepare("coco", source=tmp_path, output=tmp_path / "d")
    dataset = prepare("coco", source=f"{tmp_path}/boxes_*.json", output=tmp_path / "d")
    assert len(dataset.boxes) == 20


def test_masks_that_cannot_be_drawn_are_left_out_and_listed(tmp_path):
    triangle = [0, 0, 30, 0, 30, 40]
    whole = [[0, 20000]] * 2  # uncompressed and empty, uncompressed and full
    masks = [
        [triangle, [5, 5, 9, 9]],  # the line goes, the triangle stays
        [[5, 5, 9, 9], [1, 2, 3, 4, 5]],
        [],
        {"size": [100, 200], "counts": [20000]},
        {"size": [100, 200], "counts": "Pac0"},  # the same compressed
        {"size": [200, 100], "counts": whole[0]},
        {"size": [50, 100], "counts": [0, 5000]},  # half the photo's resolution
        triangle,  # no list around the only polygon
        None,
    ]
    annotations = [
        _annotation(n, 1, 7, [0, 0, 40 + n, 50], **({} if m is None else {"segmentation": m}))
        for n, m in enumerate(masks, start=1)
    ]
    source = _write(tmp_path / "instances_x.json", annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert dataset.image_masks(0) == [
        *([triangle], None, None, None, None, None),
        *(masks[6], [triangle], None),
    ]
    assert reasons(dataset) == {
        "polygon with fewer than 3 points": 2,
        "empty mask": 4,
        "mask of another shape than its photo": 1,
    }


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("abc", "expected polygons or size and counts"),
        ({"counts": "PPd0"}, "expected size and counts"),
        ([{"x": 1}], "expected lists of coordinates"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, mask, message):
    annotation = _annotation(4, 1, 7, [0, 0, 50, 50], segmentation=mask)
    source = _write(tmp_path / "x.json", [annotation])
    with pytest.raises(UserError, match=f"annotations number 1 has a wrong value.*{message}"):
        prepare("coco", source=source, output=tmp_path / "d")


def test_the_metric_compares_with_boxes_as_the_file_has_them(tmp_path):
    """Training boxes end at the photo; pycocotools clips no truth, of which half is outside."""
    annotations = [_annotation(1, 1, 7, [-50, 0, 100, 100], area=10000)]
    annotations.append(_annotation(2, 2, 7, [10, 10, 30, 30], area=900))
    _write(tmp_path / "s" / "val.json", annotations)
    dataset = prepare("coco", source=tmp_path / "s", output=tmp_path / "d")
    first, second = dataset.find_images(["1", "2"])
    np.testing.assert_allclose(dataset.image_boxes(first)[0], [[0, 0, 0.25, 1]])
    whole = dataset.whole_boxes[dataset.box_offsets[[first, second]]]
    np.testing.assert_allclose(whole, [[-0.25, 0, 0.25, 1], [0.05, 0.1, 0.2, 0.4]], rtol=1e-6)
    with DetectionsWriter(tmp_path / "x.parquet", {}) as writer:
        writer.add("1", ["cat"], [0.9], [[0, 0, 0.25, 1]])
        writer.add("2", ["cat"], [0.8], [[0.05, 0.1, 0.2, 0.4]])
    result = evaluate_coco(dataset, "val", tmp_path / "x.parquet", say=lambda *_: None)
    assert result["AP50"] == pytest.approx(1.0)
    assert result["AP75"] == pytest.approx(0.252, abs=1e-3)  # the second, after a wrong one
