"""Annotations as people have them: the right photo or none, ids as texts, nothing lost unsaid."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from common.convert.photo_paths import OTHER_SHAPE
from common.data.images import open_photo
from common.io.errors import UserError
from tests.prepare_data_cli import prepare, reasons, write_photo
from tests.scripts.test_prepare_voc import _xml

SQUARE = [[30, 10, 90, 10, 90, 40, 30, 40]]


def coco(path, files, annotations=None, *, categories=None, size=(60, 120), ids=None):
    """A COCO file of photos `files`, by default with one box on each."""
    ids = ids or range(1, len(files) + 1)
    sides = {"height": size[0], "width": size[1]} if size else {}
    images = [{"id": i, "file_name": file} | sides for i, file in zip(ids, files, strict=True)]
    if annotations is None:
        annotations = [
            {"id": n, "image_id": i, "category_id": 1, "bbox": [30, 10, 60, 30]}
            for n, i in enumerate(ids, 1)
        ]
    document = {
        "images": images,
        "annotations": annotations,
        "categories": categories or [{"id": 1, "name": "oak"}, {"id": 2, "name": "elm"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def convert(tmp_path, *arguments, photos=(), kind="coco", **options):
    source = coco(tmp_path / "boxes.json", *arguments) if kind == "coco" else arguments[0]
    for name in photos:
        write_photo(tmp_path / "photos" / name, 60, 120)
    return prepare(
        kind, source=source, images=tmp_path / "photos", output=tmp_path / "set", **options
    )


def found(dataset):
    return {dataset.image_id(i): dataset.image_paths[i].decode() for i in range(dataset.num_images)}


# ------------------------------------------------------------------------------------------------
# The right photo or none
# ------------------------------------------------------------------------------------------------


def test_a_photo_in_another_folder_than_stored_is_another_photo(tmp_path):
    files = ["north/7.jpg", "south/7.jpg", "south/8.jpg"]
    dataset = convert(tmp_path, files, photos=["south/7.jpg", "south/8.jpg"])
    assert found(dataset) == {"2": "south/7.jpg", "3": "south/8.jpg"}
    elsewhere = "photo not found where the annotations say, one of its name elsewhere"
    assert reasons(dataset) == {elsewhere: 1}
    with pytest.raises(UserError, match=r"stored north/7.jpg, found south/7.jpg\); --strict"):
        convert(tmp_path, files, strict=True, overwrite=True)


def test_folders_are_told_apart_by_the_end_of_the_path(tmp_path):
    files = ["/home/ann/day1/a/1.jpg", "/home/ann/day1/b/1.jpg"]
    assert found(convert(tmp_path, files, photos=["a/1.jpg", "b/1.jpg"])) == {
        "1": "a/1.jpg",
        "2": "b/1.jpg",
    }


def test_names_alone_count_when_asked_and_no_two_photos_share_one(tmp_path):
    files = ["old/1.jpg", "old/2.jpg"]
    with pytest.raises(UserError, match="stored old/1.jpg, found new/1.jpg.*--match_photos=name"):
        convert(tmp_path, files, photos=["new/1.jpg", "new/2.jpg", "other/2.jpg"])
    dataset = convert(tmp_path, files, match_photos="name")
    assert found(dataset) == {"1": "new/1.jpg"}
    assert reasons(dataset) == {"several photos fit": 1}


def test_of_equal_photos_none_is_taken_and_the_very_path_wins(tmp_path):
    dataset = convert(
        tmp_path,
        ["1.jpg", "2.jpg", "3.jpg"],
        photos=["1.jpg", "x/1.jpg", "x/2.jpg", "y/2.jpg", "3.jpg"],
    )
    assert found(dataset) == {"1": "1.jpg", "3": "3.jpg"}
    assert reasons(dataset) == {"several photos fit": 1}


def test_a_photo_that_a_link_shows_twice_is_one(tmp_path):
    write_photo(tmp_path / "photos" / "x" / "2.jpg", 60, 120)
    (tmp_path / "photos" / "y").symlink_to("x")
    assert found(convert(tmp_path, ["2.jpg"])) == {"1": "x/2.jpg"}


def test_links_to_a_folder_around_them_and_names_that_are_no_text_are_passed_over(tmp_path, capsys):
    write_photo(tmp_path / "photos" / "a.jpg", 60, 120)
    (tmp_path / "photos" / "again").symlink_to(tmp_path)
    shutil.copy(tmp_path / "photos" / "a.jpg", os.fsencode(tmp_path / "photos") + b"/\xff.jpg")
    dataset = convert(tmp_path, ["a.jpg"])
    assert found(dataset) == {"1": "a.jpg"} and not reasons(dataset)
    assert "1 files or folders have names that are no UTF-8" in capsys.readouterr().out
    voc = tmp_path / "voc"
    _xml(voc / "a.xml", [("oak", 1, 2, 30, 40)])
    shutil.copy(voc / "a.xml", os.fsencode(voc) + b"/\xff.xml")
    assert prepare("voc", source=voc, output=tmp_path / "e").num_images == 1


def test_one_photo_under_two_ids_is_said(tmp_path):
    dataset = convert(tmp_path, ["1.jpg", "1.jpg"], photos=["1.jpg"])
    assert len(found(dataset)) == 2 and reasons(dataset) == {
        "photo that has another image id, too": 1
    }


@pytest.mark.parametrize(
    ("stored", "photo"),
    [
        ("day1\\tree.jpg", "day1/tree.jpg"),
        ("D:\\work\\photos\\tree.jpg", "tree.jpg"),
        ("./day1/tree.jpg", "day1/tree.jpg"),
        ("old%20oak.jpg", "old oak.jpg"),
        ("50%25.jpg", "50%.jpg"),
        ("100%.jpg", "100%.jpg"),
        ("https://host/day1/tree.jpg?size=full", "day1/tree.jpg"),
        ("/data/local-files/?d=set/day1/tree.jpg", "day1/tree.jpg"),
        (unicodedata.normalize("NFD", "chêne.jpg"), unicodedata.normalize("NFC", "chêne.jpg")),
        (unicodedata.normalize("NFC", "chêne.jpg"), unicodedata.normalize("NFD", "chêne.jpg")),
        ("tree.jpg", "tree.JPG"),
        ("tree.jpeg", "tree.jpg"),
        ("tree.heic", "tree.jpg"),
        ("tree", "tree.jpg"),
        ("tree.rf.4f2", "tree.rf.4f2.jpg"),
    ],
)
def test_paths_of_other_machines_are_read(tmp_path, stored, photo):
    assert found(convert(tmp_path, [stored], photos=[photo])) == {"1": photo}


def test_other_formats_of_photos_are_found_and_the_stored_extension_wins(tmp_path):
    kinds = ("webp", "bmp", "tif", "gif")
    for kind in kinds:
        write_photo(tmp_path / "photos" / f"{kind}.{kind}", 60, 120)
    files = [f"{kind}.{kind}" for kind in kinds] + ["both.png"]
    dataset = convert(tmp_path, files, photos=["both.jpg", "both.png"])
    assert list(found(dataset).values()) == files
    assert dataset.image_sizes.tolist() == [[60, 120]] * 5


def test_files_that_cannot_be_read_or_end_never_are_passed_over(tmp_path):
    write_photo(tmp_path / "photos" / "1.jpg", 60, 120)

    os.mkfifo(tmp_path / "photos" / "2.jpg")
    (tmp_path / "photos" / "3.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    dataset = convert(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    assert found(dataset) == {"1": "1.jpg"}
    assert reasons(dataset) == {"photo not found": 1, "unreadable photo": 1}


# ------------------------------------------------------------------------------------------------
# Ids, classes, objects
# ------------------------------------------------------------------------------------------------


def test_ids_are_texts_wherever_they_are(tmp_path):
    annotations = [
        {"id": "a1", "image_id": "1", "category_id": 5.0, "bbox": [30, 10, 60, 30]},
        {"id": "a2", "image_id": 2, "category_id": "12", "bbox": [30, 10, 60, 30]},
    ]
    categories = [{"id": "12", "name": "elm"}, {"id": 5, "name": "oak"}]
    source = coco(tmp_path / "x.json", ["1.jpg", "2.jpg"], annotations, categories=categories)
    splits = tmp_path / "splits.json"
    splits.write_text('\ufeff{"train": ["1.jpg"], "validation": [2]}')
    dataset = prepare("coco", source=source, splits=splits, output=tmp_path / "d")
    assert dataset.class_labels == ["oak", "elm"] and dataset.meta["category_ids"] == [5, 12]
    assert dataset.box_classes.tolist() == [0, 1]
    assert [dataset.split(name).tolist() for name in ("train", "validation")] == [[0], [1]]


def test_ids_are_the_same_in_composed_and_decomposed_letters(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "zoé") for form in ("NFC", "NFD"))
    annotations = [{"image_id": decomposed, "category_id": 1, "bbox": [30, 10, 60, 30]}]
    source = coco(tmp_path / "x.json", ["1.jpg"], annotations, ids=[composed])
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert list(found(dataset)) == [composed] and len(dataset.boxes) == 1


def test_where_all_ids_of_a_kind_are_unknown_the_set_is_refused(tmp_path):
    lost = [{"id": 1, "image_id": "x9", "category_id": 1, "bbox": [30, 10, 60, 30]}]
    with pytest.raises(UserError, match="none of the 1 annotations is of an image"):
        prepare("coco", source=coco(tmp_path / "x.json", ["1.jpg"], lost), output=tmp_path / "d")


def test_categories_and_images_given_twice(tmp_path):
    same = [{"id": 1, "name": "oak"}, {"id": 1, "name": "oak"}]
    source = coco(tmp_path / "x.json", ["1.jpg", "1.jpg"], ids=[4, 4], categories=same)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert reasons(dataset) == {
        "category given twice": 1,
        "image given twice": 1,
        "duplicate row": 1,
    }
    other = [{"id": 1, "name": "oak"}, {"id": 1, "name": "elm"}]
    with pytest.raises(UserError, match="category id 1 is 'oak' and 'elm'"):
        prepare(
            "coco",
            source=coco(tmp_path / "y.json", ["1.jpg"], categories=other),
            output=tmp_path / "e",
        )


def test_objects_of_one_box_and_other_masks_are_two(tmp_path):
    triangles = ([[30, 10, 90, 10, 90, 40]], [[30, 10, 30, 40, 90, 40]])
    annotations = [
        {"image_id": 1, "category_id": 1, "bbox": [30, 10, 60, 30], "segmentation": mask}
        for mask in (*triangles, triangles[0])
    ]
    source = coco(tmp_path / "x.json", ["1.jpg"], annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert dataset.image_masks(0) == list(triangles)
    assert reasons(dataset) == {"duplicate row": 1}


def test_boxes_are_made_from_masks_and_sizes_read_from_photos(tmp_path):
    runs = {"size": [60, 120], "counts": [60 * 30 + 10, 30, 60 * 120 - 60 * 30 - 40]}
    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": SQUARE},
        {"image_id": 1, "category_id": 1, "bbox": [], "segmentation": runs},
        {"image_id": 1, "category_id": 2, "bbox": [12, 6, 12, 6], "area": 36},
    ]
    write_photo(tmp_path / "photos" / "1.jpg", 60, 120)
    source = coco(tmp_path / "x.json", ["1.jpg", "2.jpg"], annotations, size=None)
    dataset = prepare("coco", source=source, images=tmp_path / "photos", output=tmp_path / "d")
    expected = [[30, 10, 90, 40], [30, 10, 31, 40], [12, 6, 24, 12]]
    np.testing.assert_allclose(dataset.boxes * [120, 60, 120, 60], expected, rtol=1e-5)
    assert reasons(dataset) == {"box made from the segmentation": 2, "photo not found": 1}


def test_polygons_that_are_none_are_repaired_or_left_out_and_counted(tmp_path):
    masks = [
        SQUARE[0],
        [SQUARE[0], [1, 2, 3, 4]],
        [[30, 10, 90, 40]],
        [[30, 10, 1e8, 10, 90, 40]],
        {"size": [60, 120], "counts": [5]},
        {"size": [60, 1 << 40], "counts": [60 << 40]},
        {"size": [60, 120], "counts": "P" * 40},
    ]
    annotations = [
        {"image_id": 1, "category_id": 1, "bbox": [30, 10, 60 + i, 30], "segmentation": mask}
        for i, mask in enumerate(masks)
    ]
    source = coco(tmp_path / "x.json", ["1.jpg"], annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    clipped = [[30, 10, 120, 10, 90, 40]]
    assert dataset.image_masks(0) == [SQUARE, SQUARE, None, clipped, None, None, None]
    assert reasons(dataset) == {
        "polygon with fewer than 3 points": 2,
        "empty mask": 1,
        "polygon far outside the photo": 1,
        "run lengths that do not cover their frame": 3,
    }


def test_boxes_of_a_photo_that_was_turned_since_are_not_moved_onto_it(tmp_path):
    """Shares of the annotated picture would be other places; photos made smaller keep them."""
    source = coco(tmp_path / "x.json", ["small.jpg", "turned.jpg"], size=(60, 120))
    write_photo(tmp_path / "photos" / "small.jpg", 30, 61)
    write_photo(tmp_path / "photos" / "turned.jpg", 120, 60)
    arguments = dict(source=source, images=tmp_path / "photos")
    dataset = prepare("coco", output=tmp_path / "d", **arguments)
    assert found(dataset) == {"1": "small.jpg"} and len(dataset.boxes) == 1
    assert reasons(dataset) == {
        "size in the annotations is not that of the photo": 1,
        OTHER_SHAPE: 1,
    }
    with pytest.raises(UserError, match="annotated 60x120, photo 120x60.*--strict refuses"):
        prepare("coco", output=tmp_path / "e", strict=True, **arguments)


@pytest.mark.parametrize("size", [(60, 120), (120, 60)])
def test_a_photo_that_is_shown_turned_is_read_as_annotated(tmp_path, size):
    """Tools annotate it as it is stored, or as its EXIF mark shows it; batches follow the size."""
    turned = Image.Exif()
    turned[0x112] = 6  # a quarter
    write_photo(tmp_path / "photos" / "1.jpg", 60, 120, exif=turned)
    annotation = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30]}
    source = coco(tmp_path / "x.json", ["1.jpg"], [annotation], size=size)
    dataset = prepare("coco", source=source, images=tmp_path / "photos", output=tmp_path / "d")
    assert dataset.image_sizes.tolist() == [[*size]] and not reasons(dataset)
    data = (tmp_path / "photos" / "1.jpg").read_bytes()
    assert open_photo(data, tuple(dataset.image_sizes[0].tolist())).size == size


# ------------------------------------------------------------------------------------------------
# Classes
# ------------------------------------------------------------------------------------------------


def test_a_class_is_one_however_its_letters_and_spaces_are_written(tmp_path):
    name = "chêne  vert"
    files = {}
    for split, form in (("train", "NFC"), ("val", "NFD")):
        written = unicodedata.normalize(form, name) + (" " if split == "val" else "")
        files[split] = coco(
            tmp_path / "ann" / f"{split}.json",
            [f"{split}.jpg"],
            categories=[{"id": 1, "name": written}],
            ids=[len(files) + 1],
        )
    dataset = prepare("coco", source=tmp_path / "ann" / "*.json", output=tmp_path / "d")
    assert dataset.class_labels == ["chêne vert"] and len(dataset.boxes) == 2
    voc = tmp_path / "voc"
    _xml(voc / "a.xml", [(unicodedata.normalize("NFD", name), 1, 2, 30, 40)])
    (tmp_path / "classes.txt").write_text("chêne vert\n")
    dataset = prepare("voc", source=voc, classes=tmp_path / "classes.txt", output=tmp_path / "e")
    assert dataset.box_classes.tolist() == [0]


def test_categories_without_name_and_lists_that_differ_are_named(tmp_path):
    categories = [{"id": 1, "name": "oak"}, {"id": 2, "name": " \t"}]
    blank = coco(tmp_path / "blank.json", ["1.jpg"], categories=categories)
    with pytest.raises(UserError, match="categories number 2 .*expected one that can be seen"):
        prepare("coco", source=blank, output=tmp_path / "d")
    coco(tmp_path / "ann" / "a.json", ["1.jpg"])
    coco(tmp_path / "ann" / "b.json", ["2.jpg"], categories=[{"id": 1, "name": "oak"}], ids=[2])
    with pytest.raises(UserError, match="b.json: .*: id 2 is missing here and 'elm' there"):
        prepare("coco", source=tmp_path / "ann" / "*.json", output=tmp_path / "d")


def test_a_file_of_several_that_is_missing_is_named(tmp_path):
    """And paths with commas or brackets are paths before they are lists or patterns."""
    first = coco(tmp_path / "set 1, [new]" / "a.json", ["1.jpg"])
    dataset = prepare("coco", source=first, output=tmp_path / "d")
    assert dataset.num_images == 1
    first = first.rename(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"--source=.*/b.json: no JSON file there"):
        prepare("coco", source=f"{first},{tmp_path / 'b.json'}", output=tmp_path / "e")


def test_marks_of_crowds_are_read_in_every_form_and_else_refused(tmp_path):
    forms = (1, True, "1", "true", 1.0, 0, "0", None, "", False)
    annotations = [
        {"image_id": 1, "category_id": 1, "bbox": [n, 0, 20, 20], "iscrowd": form}
        for n, form in enumerate(forms)
    ]
    source = coco(tmp_path / "x.json", ["1.jpg"], annotations)
    dataset = prepare("coco", source=source, output=tmp_path / "d")
    assert [bool(flags) for flags in dataset.box_flags] == [True] * 5 + [False] * 5
    source = coco(tmp_path / "y.json", ["1.jpg"], [annotations[0] | {"iscrowd": 2}])
    with pytest.raises(UserError, match="annotations number 1 .*iscrowd 2, expected 0 or 1"):
        prepare("coco", source=source, output=tmp_path / "d2")


# ------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------


def test_leaks_between_splits_and_photos_in_none_are_said(tmp_path):
    source = coco(tmp_path / "x.json", [f"{i}.jpg" for i in range(1, 7)])
    splits = tmp_path / "s.json"
    parts = {"trainval": [1, 2, 3, 4], "train": [1, 2], "test": [4, 5]}
    splits.write_text(json.dumps(parts | {"x": [6]}))
    dataset = prepare("coco", source=source, splits=splits, output=tmp_path / "d")
    assert reasons(dataset)["in the splits trainval and test: a leak between them"] == 1
    assert not any("train and" in reason for reason in reasons(dataset))


def test_lists_with_extensions_marks_and_spaces(tmp_path):
    root = tmp_path / "VOC"
    for name in ("a", "old oak", "c"):
        _xml(root / "Annotations" / f"{name}.xml", [("x", 1, 1, 9, 9)], size=(60, 120))
        write_photo(root / "JPEGImages" / f"{name}.jpg", 60, 120)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text(
        "\ufeffJPEGImages/a.jpg\r\nold oak\r\n", encoding="utf-8"
    )
    dataset = prepare("voc", source=root, output=tmp_path / "d")
    assert [dataset.image_id(i) for i in dataset.split("train")] == ["a", "old oak"]
    assert reasons(dataset) == {"image in no split": 1}
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xff\xe9\n")
    with pytest.raises(UserError, match="train.txt: not UTF-8"):
        prepare("voc", source=root, output=tmp_path / "e")


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
