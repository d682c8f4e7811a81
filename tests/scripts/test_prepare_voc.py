"""Pascal VOC folders become a dataset that holds what they say."""

import json

import numpy as np
import pytest

from common.data.dataset import OCCLUDED, TRUNCATED
from common.io.errors import UserError
from tests.prepare_data_cli import prepare, reasons, write_photo


def _xml(path, objects, *, database="", size=(100, 200), filename=None):
    """`objects` are (name, xmin, ymin, xmax, ymax[, further XML])."""
    height, width = size
    text = "".join(
        f"<object><name>{name}</name>{''.join(more)}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d, *more in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{filename or path.stem + '.jpg'}</filename>"
        f"<source><database>{database}</database></source>"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{text}"
        "</annotation>"
    )


def test_official_layout_with_splits(tmp_path):
    root = tmp_path / "VOC2007"
    first = [
        ("dog", 1, 1, 200, 100, "<truncated>1</truncated>"),
        (
            "cat",
            21,
            11,
            120,
            60,
            "<occluded>1</occluded><part><name>head</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>",
        ),
    ]
    _xml(root / "Annotations" / "000001.xml", first, database="The VOC2007 Database")
    _xml(root / "Annotations" / "000002.xml", [], database="The VOC2007 Database")
    for name in ("000001", "000002", "000009"):
        write_photo(root / "JPEGImages" / f"{name}.jpg", 100, 200)
    write_photo(root / "SegmentationClass" / "000001.png", 100, 200)
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "train.txt").write_text("000001\n000002\n")
    (main / "test.txt").write_text("000009\n")  # no annotations published
    (main / "dog_train.txt").write_text("000001  1\n000002 -1\n")
    dataset = prepare("voc", source=tmp_path, output=tmp_path / "d")
    assert dataset.class_labels == ["cat", "dog"]
    assert dataset.splits == ["test", "train"]
    one, two, nine = dataset.find_images(["000001", "000002", "000009"])
    assert dataset.split("train").tolist() == [one, two]
    assert dataset.split("test").tolist() == [nine]
    boxes, classes, flags = dataset.image_boxes(one)
    # 1-based pixels, the last one inside: the first box is the whole photo.
    np.testing.assert_allclose(boxes, [[0, 0, 1, 1], [0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert classes.tolist() == [1, 0] and flags.tolist() == [TRUNCATED, OCCLUDED]
    assert dataset.image_file(one).endswith("JPEGImages/000001.jpg")
    assert reasons(dataset) == {}


@pytest.mark.parametrize(
    ("one_based", "database", "left"),
    [
        ("auto", "", 10),
        ("auto", "The VOC2012 Database", 9),
        ("true", "", 9),
        ("false", "The VOC2012 Database", 10),
    ],
)
def test_pixels_count_from_one_only_in_official_sets(tmp_path, one_based, database, left):
    _xml(tmp_path / "s" / "a.xml", [("x", 10, 10, 20, 20)], database=database)
    dataset = prepare("voc", source=tmp_path / "s", output=tmp_path / "d", voc_one_based=one_based)
    np.testing.assert_allclose(dataset.boxes[0] * [200, 100, 200, 100], [left, left, 20, 20])


def test_photos_of_one_name_in_two_folders(tmp_path):
    for folder, size in (("north", (100, 200)), ("south", (50, 50))):
        _xml(
            tmp_path / "s" / folder / "tile.xml",
            [("x", 0, 0, 10, 10)],
            size=size,
            filename="tile.png",
        )
        write_photo(tmp_path / "s" / folder / "tile.png", *size)
    dataset = prepare("voc", source=tmp_path / "s", output=tmp_path / "d")
    assert [dataset.image_id(i) for i in (0, 1)] == ["north/tile", "south/tile"]
    assert dataset.image_file(1).endswith("south/tile.png")
    assert dataset.image_sizes.tolist() == [[100, 200], [50, 50]]
    assert dataset.splits == ["train"] and len(dataset.split("train")) == 2


def test_class_list_gives_the_order_and_hierarchy_is_kept(tmp_path):
    _xml(tmp_path / "s" / "a.xml", [("Dead", 0, 0, 9, 9), ("Bush", 0, 0, 9, 9)])
    (tmp_path / "classes.csv").write_text("label,name\nTree,A tree\nDead,Dead\n")
    tree = {
        "LabelName": "Entity",
        "Subcategory": [{"LabelName": "Tree", "Subcategory": [{"LabelName": "Dead"}]}],
    }
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    dataset = prepare(
        "voc",
        source=tmp_path / "s",
        output=tmp_path / "d",
        classes=tmp_path / "classes.csv",
        hierarchy=tmp_path / "tree.json",
    )
    assert dataset.class_labels == ["Tree", "Dead"]
    assert dataset.class_names == ["A tree", "Dead"]
    assert dataset.hierarchy == tree
    assert dataset.box_classes.tolist() == [1]
    assert reasons(dataset) == {"unknown class": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", "a.xml: no valid XML"),
        ("<annotation></annotation>", "no objects and no --classes"),
        (
            "<annotation><size><width>wide</width><height>5</height></size></annotation>",
            "a.xml: <size/width> says 'wide'",
        ),
        (
            "<annotation><size><width>9</width><height>5</height></size>"
            "<object><name>x</name></object></annotation>",
            "no objects.*1 x object without box, first .*a.xml, row 1",
        ),
        (
            "<annotation><size><width>9</width><height>5</height></size><object><name>x</name>"
            "<bndbox><xmin>a</xmin></bndbox></object></annotation>",
            "a.xml, object 1: <bndbox> needs",
        ),
        ("<other/>", "none of 1 .xml files is Pascal VOC"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, text, message):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare("voc", source=tmp_path / "s", output=tmp_path / "d")


def test_widths_for_corners_are_refused(tmp_path):
    _xml(tmp_path / "s" / "a.xml", [("x", 50 + i, 50, 20, 20) for i in range(12)])
    with pytest.raises(UserError, match="x, y, width, height"):
        prepare("voc", source=tmp_path / "s", output=tmp_path / "d")
