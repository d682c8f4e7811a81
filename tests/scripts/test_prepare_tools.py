"""Annotations of VOC, Roboflow, YOLO, CVAT and Label Studio as people have them."""

import json
import os
import shutil

import numpy as np
import pytest

from common.io.errors import UserError
from tests.coco_files import coco, found
from tests.prepare_data_cli import prepare, reasons, write_photo
from tests.scripts.test_prepare_voc import _xml

# ------------------------------------------------------------------------------------------------
# VOC
# ------------------------------------------------------------------------------------------------


def test_voc_takes_the_nearest_photo_of_the_name_in_the_file(tmp_path):
    for folder in ("a", "b", "c"):
        _xml(
            tmp_path / "voc" / folder / "Annotations" / "t.xml",
            [("x", 1, 1, 9, 9)],
            size=(60, 120),
            filename="photo 1.jpg",
        )
    for folder in ("a", "b"):
        write_photo(tmp_path / "voc" / folder / "JPEGImages" / "photo 1.jpg", 60, 120)
    dataset = prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    assert list(found(dataset).values()) == [f"{f}/JPEGImages/photo 1.jpg" for f in "ab"]


def test_voc_falls_back_on_the_name_of_the_file_and_doubts_two_photos(tmp_path):
    for name, filename in (("1", "gone.jpg"), ("2", "1.jpg"), ("3", "3.jpg")):
        _xml(
            tmp_path / "voc" / f"{name}.xml", [("x", 1, 1, 9, 9)], size=(60, 120), filename=filename
        )
        write_photo(tmp_path / "voc" / f"{name}.jpg", 60, 120)
    dataset = prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    assert found(dataset) == {"1": "1.jpg", "3": "3.jpg"}
    assert reasons(dataset) == {
        "photo called as the annotation file is, not as it says": 1,
        "several photos fit": 1,
    }


def _voc_text(name="tree", body="", encoding=""):
    head = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding else ""
    body = body or "<bndbox><xmin>12</xmin><ymin>6</ymin><xmax>24</xmax><ymax>12</ymax></bndbox>"
    return (
        f"{head}<annotation><filename>p.jpg</filename><size><width>120</width><height>60</height>"
        f"</size><object><name>{name}</name>{body}</object></annotation>"
    )


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (_voc_text("木", encoding="GBK").encode("gbk"), "木"),
        (_voc_text("Bäume", encoding="ISO-8859-1").encode("latin-1"), "Bäume"),
        (_voc_text("Bäume", encoding="utf-8-unicode").encode(), "Bäume"),
        (_voc_text("Bäume", encoding="utf-16").encode("utf-16"), "Bäume"),
        (_voc_text().replace("<annotation>", "<annotation xmlns='urn:x'>").encode(), "tree"),
        (_voc_text("x" * 9, "<polygon><x1>12</x1><y1>6</y1><x2>24</x2><y2>6</y2><x3>24</x3><y3>12"
                   "</y3></polygon>").encode(), "x" * 9),
    ],
)  # fmt: skip
def test_xml_of_many_tools(tmp_path, data, label):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "P.XML").write_bytes(data)
    write_photo(tmp_path / "voc" / "p.jpg", 60, 120)
    dataset = prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    assert dataset.class_labels == [label] and found(dataset) == {"P": "p.jpg"}
    np.testing.assert_allclose(dataset.boxes * [120, 60, 120, 60], [[12, 6, 24, 12]], rtol=1e-5)


def test_xml_of_an_unknown_encoding_and_objects_without_name(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "p.xml").write_bytes(_voc_text("樹種", encoding="nonsense").encode("gbk"))
    with pytest.raises(UserError, match="p.xml: found bytes that are no text of nonsense"):
        prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    nameless = _voc_text().replace("</object>", "</object><object><name/></object>")
    (tmp_path / "voc" / "p.xml").write_text(nameless)
    dataset = prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    assert dataset.class_labels == ["tree"] and reasons(dataset) == {"object without name": 1}


def test_voc_without_sizes(tmp_path):
    _xml(tmp_path / "voc" / "p.xml", [("x", 12, 6, 24, 12)], size=(0, 0))
    write_photo(tmp_path / "voc" / "p.jpg", 60, 120)
    dataset = prepare("voc", source=tmp_path / "voc", output=tmp_path / "d")
    np.testing.assert_allclose(dataset.boxes, [[0.1, 0.1, 0.2, 0.2]], rtol=1e-5)


# ------------------------------------------------------------------------------------------------
# Roboflow and YOLO folders
# ------------------------------------------------------------------------------------------------


def test_folders_of_roboflow_in_one_command(tmp_path):
    for split in ("train", "valid"):
        coco(
            tmp_path / "rf" / split / "_annotations.coco.json",
            ["1.jpg", f"{split}.jpg"],
            ids=[0, 1],
        )
        for name in ("1", split):
            write_photo(tmp_path / "rf" / split / f"{name}.jpg", 60, 120)
    dataset = prepare("coco", source=tmp_path / "rf", output=tmp_path / "d")
    assert dataset.splits == ["train", "valid"]
    assert found(dataset) == {
        "train/1": "train/1.jpg",
        "train": "train/train.jpg",
        "valid/1": "valid/1.jpg",
        "valid": "valid/valid.jpg",
    }


def _yolo(folder, yaml, labels):
    (folder).mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(yaml)
    for name, text in labels.items():
        write_photo(folder / "images" / f"{name}.png", 60, 120)
        if text is not None:
            path = folder / "labels" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def test_yolo_boxes_polygons_and_photos_without_objects(tmp_path):
    labels = {
        "train/a": "1 0.5 0.5 0.2 0.4\n0 0.25 0.25 0.75 0.25 0.75 0.5\n",
        "train/b": None,
        "val/c": "0 0.5 0.5 1 1\n7 0.5 0.5 0.1 0.1\n",
    }
    yaml = "path: .\ntrain: images/train\nval: images/val\ntest:\nnames: {0: oak, 1: elm}\n"
    dataset = prepare("yolo", source=_yolo(tmp_path / "y", yaml, labels), output=tmp_path / "d")
    assert found(dataset) == {"a": "train/a.png", "b": "train/b.png", "c": "val/c.png"}
    assert dataset.class_labels == ["oak", "elm"] and dataset.splits == ["train", "val"]
    expected = [[0.4, 0.3, 0.6, 0.7], [0.25, 0.25, 0.75, 0.5], [0, 0, 1, 1]]
    np.testing.assert_allclose(dataset.boxes, expected, rtol=1e-6)
    assert dataset.image_masks(0) == [None, [[30, 15, 90, 15, 90, 30]]]
    assert reasons(dataset) == {"photo without text file": 1, "unknown class": 1}


def test_yolo_photos_of_one_name_labels_without_photo_and_equal_splits_are_said(tmp_path):
    yaml = "train: images/a\nval: images/a\nnc: 1\nnames: [oak]\n"
    labels = {"a/x": "0 0.5 0.5 0.2 0.4\n", "a/y": "0 0.5 0.5 0.2 0.4\n"}
    folder = _yolo(tmp_path / "y", yaml, labels)
    write_photo(folder / "images" / "a" / "x.jpg", 60, 120)
    (folder / "labels" / "a" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (folder / "labels" / "a" / "classes.txt").write_text("oak\n")
    shutil.copy(folder / "labels/a/gone.txt", os.fsencode(folder / "labels/a") + b"/\xff.txt")
    dataset = prepare("yolo", source=folder, output=tmp_path / "d")
    assert found(dataset) == {"x.jpg": "x.jpg", "x.png": "x.png", "y": "y.png"}
    assert reasons(dataset) == {
        "text file of no photo in a split": 2,
        "in the splits train and val: a leak between them": 3,
    }
    (folder / "data.yaml").write_text(yaml.replace("nc: 1", "nc: 2"))
    with pytest.raises(UserError, match="field nc: found 2, and 1 names"):
        prepare("yolo", source=folder, output=tmp_path / "e")


def test_yolo_exports_of_label_studio_and_cvat(tmp_path):
    studio = _yolo(tmp_path / "studio", "", {"a": "1 0.5 0.5 0.2 0.4\n"})
    (studio / "data.yaml").unlink()
    (studio / "classes.txt").write_text("oak\nelm\n")
    dataset = prepare("yolo", source=studio, output=tmp_path / "d")
    assert dataset.class_labels == ["oak", "elm"] and dataset.box_classes.tolist() == [1]
    cvat = tmp_path / "cvat"
    write_photo(cvat / "obj_train_data" / "a.jpg", 60, 120)
    (cvat / "obj_train_data" / "a.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (cvat / "train.txt").write_text("data/obj_train_data/a.jpg\n")
    (cvat / "obj.names").write_text("oak\n")
    (cvat / "obj.data").write_text("classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n")
    dataset = prepare("yolo", source=cvat, output=tmp_path / "e")
    assert found(dataset) == {"a": "a.jpg"} and len(dataset.boxes) == 1


def test_groups_stay_together(tmp_path):
    files = [f"cam{i % 7}/{i}.jpg" for i in range(1, 71)]
    source = coco(tmp_path / "x.json", files)
    options = dict(source=source, split="grouped", shares=["train=0.6", "test=0.4"])
    for number, group in enumerate(("", r"cam(\d)")):
        dataset = prepare("coco", output=tmp_path / f"{number}", group=group, **options)
        cameras = [
            {found(dataset)[dataset.image_id(i)].split("/")[0] for i in dataset.split(name)}
            for name in ("train", "test")
        ]
        assert not cameras[0] & cameras[1] and [len(part) for part in cameras] == [4, 3]
    with pytest.raises(UserError, match="--group=dog: finds nothing in cam1/1.jpg"):
        prepare("coco", output=tmp_path / "z", group="dog", **options)


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="x.json: found no regular file"):
        prepare("coco", source=tmp_path / "x.json", output=tmp_path / "d")


@pytest.mark.parametrize(
    ("yaml", "text", "message"),
    [
        ("train: images/t\nnames: [x]", "0 0.5 0.5 0.1", "a.txt, row 1: .*4 numbers"),
        ("train: images/t\nnames: [x]", "x 0.5 0.5 0.1 0.1", "a.txt, row 1: .*expected class x y"),
        ("train: images/t\nnames: 3", "", "field names"),
        ("train: images/t", "", "field names"),
        ("names: [x]", "", "no photo where train"),
        ("train: gone\nnames: [x]", "", "no photo where train"),
        ("train: {a: 1}\nnames: [x]", "", "field train"),
        ("a: [", "", "no valid YAML"),
    ],
)
def test_broken_yolo_folders_get_one_line(tmp_path, yaml, text, message):
    source = _yolo(tmp_path / "y", yaml, {"t/a": text})
    with pytest.raises(UserError, match=message) as caught:
        prepare("yolo", source=source, output=tmp_path / "d")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Forms of the tools' own
# ------------------------------------------------------------------------------------------------


def test_cvat_for_images(tmp_path):
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><labels><label><name>oak</name></label><label><name>elm</name>"
        "</label></labels></task></meta>"
        '<image id="0" name="day1/a.jpg" width="120" height="60">'
        '<box label="elm" xtl="12" ytl="6" xbr="24" ybr="12"/>'
        '<box label="oak" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90"/>'
        '<polygon label="oak" points="30,10;90,10;90,40"/><points label="oak" points="1,2"/>'
        "</image>"
        '<image id="1" name="day2/a.jpg" width="120" height="60"/></annotations>'
    )
    for name in ("day1/a.jpg", "day2/a.jpg"):
        write_photo(tmp_path / "images" / name, 60, 120)
    dataset = prepare("cvat", source=tmp_path, output=tmp_path / "d")
    assert found(dataset) == {f"day{n}/a": f"images/day{n}/a.jpg" for n in (1, 2)}
    assert dataset.class_labels == ["oak", "elm"] and dataset.box_classes.tolist() == [1, 0, 0]
    expected = [[12, 6, 24, 12], [25, 15, 35, 35], [30, 10, 90, 40]]
    np.testing.assert_allclose(dataset.boxes * [120, 60, 120, 60], expected, rtol=1e-5)
    assert dataset.image_masks(0) == [None, None, [[30, 10, 90, 10, 90, 40]]]
    assert reasons(dataset) == {"object that is no box or polygon": 1}


def _task(image, *values, **more):
    results = [
        {"type": kind, "value": value, "original_width": 120, "original_height": 60}
        for kind, value in values
    ]
    return {"data": {"image": image}, "annotations": [{"result": results}], **more}


def test_label_studio(tmp_path):
    box = {"x": 10, "y": 10, "width": 10, "height": 10, "rectanglelabels": ["oak", "elm"]}
    tasks = [
        _task(
            "/data/upload/3/1a2b-my%20a.jpg",
            ("rectanglelabels", box),
            ("rectanglelabels", box | {"rotation": 90}),
            ("polygonlabels", {"points": [[25, 25], [75, 25], [75, 50]], "polygonlabels": ["elm"]}),
            ("brushlabels", {"brushlabels": ["elm"], "rle": [1]}),
        ),
        _task("/data/local-files/?d=day1/b.jpg"),
        _task("/data/local-files/?d=day1/b.jpg"),
    ]
    (tmp_path / "x.json").write_text(json.dumps(tasks))
    for name in ("1a2b-my a.jpg", "day1/b.jpg"):
        write_photo(tmp_path / "photos" / name, 60, 120)
    dataset = prepare(
        "label_studio",
        source=tmp_path / "x.json",
        images=tmp_path / "photos",
        output=tmp_path / "d",
    )
    assert found(dataset) == {"1a2b-my a": "1a2b-my a.jpg", "b": "day1/b.jpg"}
    assert dataset.class_labels == ["elm", "oak"]
    expected = [[12, 6, 24, 12], [6, 6, 12, 18], [30, 15, 90, 30]]
    np.testing.assert_allclose(dataset.boxes * [120, 60, 120, 60], expected, rtol=1e-5)
    assert reasons(dataset) == {
        "object that is no box or polygon": 1,
        "further class of an object": 2,
        "photo given twice, objects of both": 1,
    }


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("cvat", "<annotations/>", "found no image"),
        ("cvat", "<a><image name='x'><box label='t' xtl='?'/></image></a>", "image 'x': .*numbers"),
        ("cvat", "<a><image name='x'><polygon label='t' points='1'/></image></a>", "image 'x'"),
        ("label_studio", "[]", "found no image"),
        ("label_studio", '[{"data": {}}]', "task 1: found another form"),
        ("label_studio", '[{"data": {"i": "a"}, "annotations": [{"result": [1]}]}]', "task 1"),
        ("label_studio", "[[3]]", "task 1"),
    ],
)  # fmt: skip
def test_broken_exports_get_one_line(tmp_path, kind, text, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        prepare(kind, source=tmp_path / "x", output=tmp_path / "d")
    assert "\n" not in str(caught.value)
