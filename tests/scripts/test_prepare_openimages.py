"""OpenImages files become a dataset that holds what they say, or one line says what is wrong."""

import json
import struct
import zlib

import numpy as np
import pytest
from absl import flags
from PIL import Image

from common.data.dataset import DEPICTION, GROUP_OF, OCCLUDED
from common.io.errors import UserError
from tests.prepare_data_cli import HEADER, openimages_source, prepare, reasons, write_photo


def _boxes(dataset, image_id):
    (index,) = dataset.find_images([image_id])
    boxes, classes, flags = dataset.image_boxes(index)
    return boxes.tolist(), [dataset.class_labels[c] for c in classes], flags.tolist()


def test_rows_of_an_image_are_gathered_in_their_order(tmp_path):
    rows = ["x,/m/a,0.5,0.75,0.25,1,0", "y,/m/b,0,1,0,1,1", "x,/m/c,0,0.25,0,0.5,0"]
    source = openimages_source(tmp_path / "s", rows, labels=["y,/m/a,0", "z,/m/c,1"])
    openimages_source(tmp_path / "s", ["v,/m/a,0,1,0,1,0"], split="validation")
    dataset = prepare("openimages", source=source, output=tmp_path / "d")
    assert dataset.class_labels == ["/m/a", "/m/b", "/m/c"]
    assert dataset.class_names == ["Mouse", "Mouse", "Cat"]
    expected = ([[0.5, 0.25, 0.75, 1], [0, 0, 0.25, 0.5]], ["/m/a", "/m/c"], [0, 0])
    assert _boxes(dataset, "x") == expected
    assert _boxes(dataset, "y") == ([[0, 0, 1, 1]], ["/m/b"], [GROUP_OF])
    # An image that only has image-level labels is there too.
    assert _boxes(dataset, "z") == ([], [], [])
    assert [a.tolist() for a in dataset.image_labels(dataset.find_images(["y"])[0])] == [[0], [0]]
    assert [dataset.image_id(i) for i in dataset.split("train")] == ["x", "y", "z"]
    assert [dataset.image_id(i) for i in dataset.split("validation")] == ["v"]
    assert reasons(dataset) == {}


def test_v4_files_with_13_columns_in_any_order(tmp_path):
    header = (
        "ImageID,Source,Confidence,LabelName,YMin,XMin,XMax,YMax,IsOccluded,IsTruncated,"
        "IsGroupOf,IsDepiction,IsInside,Extra"
    )
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/a,A\n/m/b,B\n")
    tree = {"LabelName": "/m/root", "Subcategory": [{"LabelName": "/m/a"}, {"LabelName": "/m/b"}]}
    (tmp_path / "bbox_labels_600_hierarchy.json").write_text(json.dumps(tree))
    rows = ["i,xclick,1,/m/b,0.25,0,0.5,1,1,0,-1,1,0,hello"]
    name = "oidv6-train-annotations-bbox.csv"
    (tmp_path / name).write_text("\n".join([header, *rows]) + "\n")
    name = "train-annotations-human-imagelabels-boxable.csv"
    (tmp_path / name).write_text("ImageID,Source,LabelName,Confidence\ni,verification,/m/a,0\n")
    dataset = prepare("openimages", source=tmp_path, output=tmp_path / "d")
    assert _boxes(dataset, "i") == ([[0, 0.25, 0.5, 1]], ["/m/b"], [OCCLUDED | DEPICTION])
    assert dataset.hierarchy == tree
    assert dataset.image_labels(0)[0].tolist() == [0]


def test_rows_without_meaning_are_counted_by_reason_and_listed(tmp_path):
    rows = [
        "x,/m/a,0.1,0.2,0.1,0.2,0",
        "x,/m/a,0.1,0.2,0.1,0.2,0",  # duplicate
        "x,/m/zzz,0.1,0.2,0.1,0.2,0",  # unknown class
        "x,/m/a,0.2,0.2,0.1,0.2,0",  # zero area
        "x,/m/a,1.2,1.3,0.1,0.2,0",  # outside
        "x,/m/a,-0.1,0.5,0.1,0.2,0",  # clipped
        "x,/m/a,nan,0.5,0.1,0.2,0",
        "x,/m/a,inf,0.5,0.1,0.2,0",
        "only_bad,/m/a,,0.5,0.1,0.2,0",
    ]
    dataset = prepare(
        "openimages", source=openimages_source(tmp_path / "s", rows), output=tmp_path / "d"
    )
    assert reasons(dataset) == {
        "number missing or not finite": 3,
        "duplicate row": 1,
        "unknown class": 1,
        "zero area": 1,
        "outside the frame": 1,
        "reaches outside the frame": 1,
    }
    boxes, _, _ = _boxes(dataset, "x")
    np.testing.assert_allclose(boxes, [[0.1, 0.1, 0.2, 0.2], [0, 0.1, 0.5, 0.2]], rtol=1e-6)
    assert _boxes(dataset, "only_bad") == ([], [], [])  # the image stays
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    unknown = next(entry for entry in report if entry["reason"] == "unknown class")
    assert unknown["action"] == "dropped"
    assert unknown["examples"][0]["row"] == 4  # the header is line 1
    assert unknown["examples"][0]["file"].endswith("train-detection-bbox.csv")


def test_strict_refuses_them_and_writes_nothing(tmp_path):
    rows = ["x,/m/a,0.1,0.2,0.1,0.2,0", "x,/m/a,0.2,0.2,0.1,0.2,0"]
    source = openimages_source(tmp_path / "s", rows)
    with pytest.raises(UserError, match=r"detection-bbox.csv, row 3: zero area .*--strict"):
        prepare("openimages", source=source, output=tmp_path / "d", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_photos_are_found_by_id_and_missing_ones_drop_the_image(tmp_path):
    rows = [f"{i},/m/a,0.1,0.2,0.1,0.2,0" for i in ("one", "two", "gone", "broken", "turned")]
    source = openimages_source(tmp_path / "s", rows)
    write_photo(tmp_path / "photos" / "deep" / "one.jpg", 30, 40)
    write_photo(tmp_path / "photos" / "two.PNG", 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_photo(tmp_path / "photos" / "turned.jpeg", 30, 40, exif=exif)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    dataset = prepare(
        "openimages", source=source, output=tmp_path / "d", images=tmp_path / "photos"
    )
    assert [dataset.image_id(i) for i in range(3)] == ["one", "two", "turned"]
    assert dataset.image_sizes.tolist() == [[30, 40], [20, 10], [40, 30]]
    assert dataset.image_file(0) == str(tmp_path / "photos" / "deep" / "one.jpg")
    assert reasons(dataset) == {"photo not found": 1, "unreadable photo": 1}
    assert len(dataset.split("train")) == 3


def test_very_large_and_odd_photos_are_measured(tmp_path):
    source = openimages_source(
        tmp_path / "s", [f"{name},/m/a,0,1,0,1,0" for name in ("huge", "grey", "cmyk", "deep")]
    )
    photos = tmp_path / "p"
    photos.mkdir()
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )
    (photos / "huge.png").write_bytes(content)
    Image.new("L", (5, 4)).save(photos / "grey.jpg")
    Image.new("CMYK", (5, 4)).save(photos / "cmyk.jpg")
    Image.new("I;16", (5, 4)).save(photos / "deep.png")
    dataset = prepare("openimages", source=source, output=tmp_path / "d", images=photos)
    assert dataset.image_sizes.tolist() == [[20_000, 20_000], [4, 5], [4, 5], [4, 5]]
    assert reasons(dataset) == {}


def test_cut_photos_are_found_on_demand(tmp_path):
    source = openimages_source(
        tmp_path / "s", ["a,/m/a,0.1,0.2,0.1,0.2,0", "b,/m/a,0.1,0.2,0.1,0.2,0"]
    )
    for name in "ab":
        write_photo(tmp_path / "p" / f"{name}.jpg", 300, 400)
    cut = tmp_path / "p" / "b.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    where = {"source": source, "images": tmp_path / "p"}
    assert prepare("openimages", output=tmp_path / "d1", **where).num_images == 2
    dataset = prepare("openimages", output=tmp_path / "d2", check_photos=True, **where)
    assert [dataset.image_id(i) for i in range(dataset.num_images)] == ["a"]


def test_photos_under_a_remote_address_are_taken_on_trust(tmp_path):
    source = openimages_source(tmp_path / "s", ["x,/m/a,0,1,0,1,0"])
    dataset = prepare(
        "openimages",
        source=source,
        output=tmp_path / "d",
        images="gs://bucket/photos",
        image_pattern="train/{id}.jpg",
    )
    assert dataset.image_file(0) == "gs://bucket/photos/train/x.jpg"


def test_no_photo_at_all_is_an_error(tmp_path):
    source = openimages_source(tmp_path / "s", ["x,/m/a,0,1,0,1,0"])
    write_photo(tmp_path / "p" / "other.jpg", 8, 8)
    with pytest.raises(UserError, match="none of the 1 photos is there.*'x'"):
        prepare("openimages", source=source, output=tmp_path / "d", images=tmp_path / "p")


def test_splits_file_adds_and_replaces(tmp_path):
    rows = [f"{i:012d},/m/a,0,1,0,1,0" for i in range(4)]
    source = openimages_source(tmp_path / "s", rows)
    for i in (0, 1, 2, 3, 9):
        write_photo(tmp_path / "p" / f"{i:012d}.jpg", 8, 8)
    splits = {"train": [0, "000000000002"], "mini": [3, 3], "all": [1, "000000000009", "nowhere"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    dataset = prepare(
        "openimages",
        source=source,
        images=tmp_path / "p",
        splits=tmp_path / "splits.json",
        output=tmp_path / "d",
    )
    named = {s: [int(dataset.image_id(i)) for i in dataset.split(s)] for s in dataset.splits}
    # 9 has a photo and no annotations: a photo without labels, as in a test set.
    assert named == {"train": [0, 2], "mini": [3], "all": [1, 9]}
    assert reasons(dataset) == {"id twice in a split": 1, "split id without photo": 1}


def test_splits_of_other_ids_are_refused(tmp_path):
    source = openimages_source(tmp_path / "s", ["abc,/m/a,0,1,0,1,0"])
    (tmp_path / "splits.json").write_text('{"train": [17]}')
    with pytest.raises(UserError, match="none of the ids of split 'train'.*17.*'abc'"):
        prepare("openimages", source=source, splits=tmp_path / "splits.json", output=tmp_path / "d")


def test_masks_are_kept_by_reference(tmp_path):
    source = openimages_source(
        tmp_path / "s", ["x,/m/a,0.1,0.5,0.1,0.5,0", "x,/m/a,0.2,0.6,0.2,0.6,0"]
    )
    write_photo(source / "masks" / "x_ma_2.png", 4, 4)
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    lines = [
        header,
        "x_ma_2.png,x,/m/a,2,0.2,0.6,0.2,0.6,,",
        "x_ma_1.png,x,/m/a,1,0.1,0.5,0.1,0.5,,",  # no such file
        "x_ma_2.png,x,/m/b,3,0.2,0.6,0.2,0.6,,",  # no such box
    ]
    (source / "challenge-2019-train-segmentation-masks.csv").write_text("\n".join(lines) + "\n")
    dataset = prepare("openimages", source=source, output=tmp_path / "d")
    assert dataset.image_masks(0) == [None, {"png": str(source / "masks" / "x_ma_2.png")}]
    assert reasons(dataset) == {"mask file not found": 1, "mask without a box": 1}


def test_2000_boxes_and_a_one_pixel_box(tmp_path):
    rows = [f"x,/m/a,{i / 4000},{i / 4000 + 0.1},0,0.5,0" for i in range(1999)]
    rows.append("x,/m/b,0.5,0.50005,0.5,0.50005,0")  # one pixel of a 20,000 pixel photo
    dataset = prepare(
        "openimages", source=openimages_source(tmp_path / "s", rows), output=tmp_path / "d"
    )
    assert len(dataset.image_boxes(0)[0]) == 2000
    assert reasons(dataset) == {}


_TEN = [f"x{i},/m/a,0.1,0.2,0.1,0.2,0" for i in range(10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": HEADER.replace("XMin", "left")}, "no column XMin; found ImageID, .*left"),
        ({"rows": ["x,/m/a,0.1,zero,0.1,0.2,0"]}, "column XMax, Row #2: .*'zero'"),
        ({"rows": ["x,/m/a,0.1,0.2,0.1,0.2,0", "y,/m/a,0.1"]}, "Row #3: Expected 7 columns, got 3"),
        ({"rows": ["x,/q,0,1,0,1,0"]}, "none of the first 1 rows has a known class.*'/q'.*'/m/a'"),
        ({"rows": [f"x{i},/m/a,10,200,10,200,0" for i in range(10)]}, "look like pixels"),
        ({"rows": [f"x{i},/m/a,0.4,0.2,0.5,0.1,0" for i in range(10)]}, "x, y, width, height"),
        ({"classes": ""}, "class list is empty"),
        ({"classes": "/m/a,A\n/m/a,B\n"}, "label '/m/a' is given in lines 1 and 2"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, change, message):
    source = openimages_source(tmp_path / "s", **{"rows": _TEN, **change})
    with pytest.raises(UserError, match=message) as error:
        prepare("openimages", source=source, output=tmp_path / "d")
    assert "\n" not in str(error.value)
    assert "challenge-2019" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected a CSV file with a header"),
        ((HEADER + "\nx\xe4,/m/a,0,1,0,1,0\n").encode("latin1"), "UTF-?8"),
        ("ImageID,Größe\n".encode("latin1"), "row 1 is not UTF-8"),
    ],
)
def test_broken_bytes_get_one_clear_line(tmp_path, content, message):
    source = openimages_source(tmp_path / "s", _TEN)
    (source / "challenge-2019-train-detection-bbox.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"detection-bbox.csv: .*{message}"):
        prepare("openimages", source=source, output=tmp_path / "d")


def test_a_header_without_rows_is_an_empty_split(tmp_path):
    source = openimages_source(tmp_path / "s", _TEN)
    openimages_source(source, [], split="validation")
    (source / "challenge-2019-validation-detection-bbox.csv").write_text(HEADER + "\n")
    dataset = prepare("openimages", source=source, output=tmp_path / "d")
    assert len(dataset.split("validation")) == 0 and len(dataset.split("train")) == 10


def test_missing_and_ambiguous_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        prepare("openimages", source=tmp_path / "nowhere", output=tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="challenge-2019-train-detection-bbox.csv"):
        prepare("openimages", source=tmp_path / "empty", output=tmp_path / "d")
    source = openimages_source(tmp_path / "s", _TEN)
    openimages_source(source / "copy", _TEN, classes="/m/a,A\n")
    with pytest.raises(UserError, match="two box files for split train"):
        prepare("openimages", source=source, output=tmp_path / "d")


def test_hierarchy_of_other_classes_is_refused(tmp_path):
    source = openimages_source(tmp_path / "s", _TEN)
    (tmp_path / "tree.json").write_text('{"LabelName": "r", "Subcategory": [{"LabelName": "q"}]}')
    with pytest.raises(UserError, match="none of the classes is in this hierarchy"):
        prepare(
            "openimages", source=source, output=tmp_path / "d", hierarchy=tmp_path / "tree.json"
        )


def _with_v5_beside(folder):
    """Challenge files of training and validation, V5 files of training, validation and test."""
    source = openimages_source(folder, ["x,/m/a,0,1,0,1,0"], labels=["x,/m/b,0"])
    for split, image in (("train", "x"), ("validation", "y"), ("test", "z")):
        rows = [HEADER, f"{image},/m/a,0,1,0,1,0", f"{image},/m/c,0,0.5,0,1,0"]
        (source / f"{split}-annotations-bbox.csv").write_text("\n".join(rows) + "\n")
        labels = ["ImageID,LabelName,Confidence", f"{image},/m/c,1"]
        name = f"{split}-annotations-human-imagelabels-boxable.csv"
        (source / name).write_text("\n".join(labels) + "\n")
    return source


def test_v5_files_beside_those_of_the_challenge_are_a_choice(tmp_path, capsys):
    source = _with_v5_beside(tmp_path / "s")
    dataset = prepare("openimages", source=source, output=tmp_path / "d")
    assert dataset.splits == ["train"] and len(dataset.boxes) == 1
    assert dataset.image_labels(0)[0].tolist() == [1]
    printed = capsys.readouterr().out
    assert "those of v5 (train, validation, test) lie beside and are not read" in printed
    dataset = prepare("openimages", source=source, output=tmp_path / "e", boxes="v5")
    assert dataset.splits == ["test", "train", "validation"] and len(dataset.boxes) == 6
    assert dataset.image_labels(0)[0].tolist() == [2]
    assert "those of challenge (train) lie beside" in capsys.readouterr().out
    (tmp_path / "s" / "challenge-2019-train-detection-bbox.csv").unlink()
    with pytest.raises(UserError, match="no box file of --boxes=challenge"):
        prepare("openimages", source=source, output=tmp_path / "f", boxes="challenge")


@pytest.mark.parametrize(
    ("flag", "value"), [("shares", ["a=1"]), ("pool", ["train"]), ("split_seed", 1)]
)
def test_how_to_divide_without_a_division_is_refused(tmp_path, flag, value):
    openimages_source(tmp_path / "s", ["x,/m/a,0,1,0,1,0"])
    with pytest.raises(UserError, match=f"--{flag}: found no --split, expected --split=random"):
        prepare("openimages", source=tmp_path / "s", output=tmp_path / "d", **{flag: value})


def test_a_negative_seed_of_the_division_is_refused(tmp_path):
    with pytest.raises(flags.IllegalFlagValueError, match="split_seed.*non-negative"):
        prepare("openimages", source=tmp_path, output=tmp_path / "d", split_seed=-1)


def test_splits_are_pooled_and_divided_anew(tmp_path):
    source = _with_v5_beside(tmp_path / "s")
    rows = [HEADER, *(f"t{i:03},/m/{'a' if i % 10 else 'c'},0,1,0,1,0" for i in range(200))]
    (source / "train-annotations-bbox.csv").write_text("\n".join(rows) + "\n")
    options = dict(source=source, boxes="v5", split="stratified")
    dataset = prepare("openimages", output=tmp_path / "d", **options)
    parts = {name: dataset.split(name) for name in dataset.splits}
    for name, images in (("train", 162), ("validation", 20), ("test", 20)):
        assert abs(len(parts[name]) - images) <= 2, name
    everything = np.sort(np.concatenate(list(parts.values())))
    assert everything.tolist() == list(range(dataset.num_images))
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        classes = np.concatenate([dataset.image_boxes(i)[1] for i in parts[name]])
        assert abs(int((classes == 2).sum()) - 22 * share) <= 1.5, name
    # Training and validation alone, under names of one's own.
    options |= dict(split="random", pool=["train", "validation"], shares=["a=0.5", "b=0.5"])
    dataset = prepare("openimages", output=tmp_path / "e", **options)
    assert {name: len(dataset.split(name)) for name in dataset.splits} == {
        "a": 101,
        "b": 101,
        "test": 1,
    }
    with pytest.raises(UserError, match="--pool=dev .*the splits are train, validation, test"):
        prepare("openimages", output=tmp_path / "f", **options | dict(pool=["dev"]))
