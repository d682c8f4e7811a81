"""Annotations as people have them: the right photo or none, ids as texts, nothing lost unsaid."""

import gzip
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
from tests.coco_files import SQUARE, coco, convert, found
from tests.prepare_data_cli import prepare, reasons, write_photo
from tests.scripts.test_prepare_voc import _xml

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


def test_a_compressed_file_is_the_split_of_its_name(tmp_path):
    plain = coco(tmp_path / "instances_train.json", ["1.jpg"])
    packed = tmp_path / "instances_train.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert prepare("coco", source=packed, output=tmp_path / "d").splits == ["train"]


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
