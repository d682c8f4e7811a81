"""Files of the exchange formats that break their rules are answered in one line."""

import base64
import gzip
import json
import os
import zlib

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from common.io.errors import UserError
from common.tables.exchange import ids, rows
from common.tables.exchange.openimages_csv import write_openimages
from common.tables.exchange.results_json import read_results
from common.tables.exchange.spool import Importer
from tests.common.tables.exchanged import CATEGORIES, LABELS, read_back, write

OFFLINE = "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n"
SUBMISSION = "ImageId,PredictionString\n"
MASKS = "ImageID,ImageWidth,ImageHeight,PredictionString\n"
GOOD = "/m/a 0.5 0 0 1 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUBMISSION + f"a,{GOOD}\nb,/m/a 0.5 0 0 1\n", "row 3: image 'b' has 5 words"),
        (SUBMISSION + f"a,{GOOD}\na,\n", "row 3: image 'a' is there twice"),
        (SUBMISSION + "a,\nq,\n", "row 3: image 'q' is not in split 'x'"),
        (SUBMISSION + f"a,{GOOD} /m/b high 0 0 1 1\n", "row 2: score 'high' is no number"),
        (SUBMISSION + f"a,{GOOD}\nb,/m/a 0.5 0 0 1 one\n", "row 3: coordinate 'one'"),
        (SUBMISSION + "a,\nb,/m/a nan 0 0 1 1\n", "row 3: score nan"),
        (SUBMISSION + "a,/m/a 87 0 0 1 1\n", r"row 2: score 87, expected a number in \[0, 1.5\]"),
        (SUBMISSION + "a,/m/a 0.5 0 0 640 480\n", "row 2: box .* normalised .*--clip"),
        (SUBMISSION + "a,/m/a 0.5 0.9 0 0.1 1\n", "row 2: inverted box"),
        (SUBMISSION + "a,/m/q 0.5 0 0 1 1\n", "row 2: label '/m/q' is not among"),
        (SUBMISSION + "a,b,c\n", "row 2: 3 columns of 2"),
        ("ImageID,Predictions\na,\n", "header 'ImageID,Predictions', expected ImageId,Pred"),
        ("Id,PredictionString\na,\n", "no column imageid"),
        ("", "empty, expected a CSV"),
        (OFFLINE + "a,/m/a,0.5,0,1,0,1\nb,/m/a,x,0,1,0,1\n", "column Score.*x"),
        (OFFLINE + "a,/m/a,0.5,0,1,0,1\nb,/m/a,,0,1,0,1\n", "row 3: Score is empty"),
        (OFFLINE + "a,/m/a,0.5,0,1,0,1\nb,/m/a,0.5,0.9,0.1,0,1\n", "row 3: inverted"),
        (OFFLINE + "a,/m/a,0.5,0,1,0,1\nq,/m/a,0.5,0,1,0,1\n", "row 3: image 'q' is not in"),
        (OFFLINE.replace(",Score", ""), "no column Score"),
    ],
)
def test_bad_rows_of_boxes_are_named(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"bad.csv: .*{message}"):
        read_back(path, tmp_path / "y.parquet", covered=["a", "b"], class_labels=LABELS)
    assert os.listdir(tmp_path) == ["bad.csv"]


def encoded(counts):
    return base64.b64encode(zlib.compress(counts)).decode()


ONES = coco_mask.encode(np.ones((3, 2), np.uint8, order="F"))["counts"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"b,2,3,/m/a 0.5 {encoded(ONES)[:-4]}", "row 3: mask .* no base64 of zlib"),
        ("b,2,3,/m/a 0.5 ????", "row 3: mask '[?]{4}' is no base64"),
        (f"b,3,3,/m/a 0.5 {encoded(ONES)}", "row 3: mask runs cover 6 pixels, expected height 3"),
        (f"b,2,3,/m/a 0.5 {encoded(b'~~')}", "row 3: counts b'~~' are no compressed"),
        (f"b,2.5,3,/m/a 0.5 {encoded(ONES)}", "row 3: image 'b' has ImageHeight '3' and"),
        ("b,2,3,/m/a 0.5", "row 3: image 'b' has 2 words in PredictionString, expected 3"),
    ],
)
def test_bad_masks_are_named(tmp_path, row, message):
    path = tmp_path / "bad.csv"
    path.write_text(f"{MASKS}a,2,3,/m/a 0.5 {encoded(ONES)}\n{row}\n")
    with pytest.raises(UserError, match=f"bad.csv: .*{message}"):
        read_back(path, tmp_path / "y.parquet", masks=True)
    assert os.listdir(tmp_path) == ["bad.csv"]


GOOD_RESULT = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 5], "score": 0.5}
SEGMENT = {"size": [3, 2], "counts": ONES.decode()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "row 2: image_id 8 is not in set"),
        ({"category_id": 1}, "row 2: category_id 1 is not in set"),
        ({"score": None}, "row 2: .*score"),
        ({"score": float("nan")}, "no valid JSON near .*NaN"),
        ({"score": 50}, "row 2: score 50"),
        ({"bbox": [0, 0, 4]}, r"row 2: bbox \[0, 0, 4\], expected"),
        ({"bbox": [0, 0, -4, 5]}, r"row 2: bbox \[.*-4.0.*expected x, y, width"),
        ({"bbox": [0, 0, 400, 5]}, "row 2: box .* normalised.*--clip"),
        ({"bbox": "here"}, "row 2: could not convert|row 2: .*number"),
        ({"bbox": None}, "row 2: no field 'bbox'"),
        ({"bbox": None, "segmentation": [[0, 0, 1, 1, 2, 2]]}, "row 2: .*polygons"),
        ({"bbox": None, "segmentation": {"size": [9, 9], "counts": "11"}}, "row 2: mask runs"),
        (None, "row 2: .*null"),
    ],
)
def test_bad_results_are_named(tmp_path, change, message):
    path = tmp_path / "bad.json"
    bad = None if change is None else {**GOOD_RESULT, **change}
    path.write_text(json.dumps([GOOD_RESULT, bad, GOOD_RESULT]))
    images = ids.Images({"7": 7}, {"7": (5, 4)}, "set")
    importer = Importer(path)
    with pytest.raises(UserError, match=f"bad.json: {message}"):
        importer.write(
            read_results(path, images, CATEGORIES, masks=False), tmp_path / "y.parquet", {}
        )
    assert os.listdir(tmp_path) == ["bad.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"annotations": []}', "a list .* at the top"),
        ("[", "cut off"),
        ("", "cut off"),
        ('[{"a": }]', "no valid JSON"),
    ],
)
def test_what_is_no_list_of_results(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    images = ids.Images({"7": 7}, {}, "set")
    with pytest.raises(UserError, match=f"bad.json: .*{message}"):
        list(read_results(tmp_path / "bad.json", images, CATEGORIES, masks=False))


def test_cut_gz_files_are_refused(tmp_path):
    data = gzip.compress((SUBMISSION + f"a,{GOOD}\n" * 100).encode())
    (tmp_path / "x.csv.gz").write_bytes(data[:-20])
    with pytest.raises(UserError, match="x.csv.gz: cannot read it"):
        read_back(tmp_path / "x.csv.gz", tmp_path / "y.parquet")
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps([GOOD_RESULT]).encode())[:-9])
    images = ids.Images({"7": 7}, {"7": (5, 4)}, "set")
    with pytest.raises(UserError, match="x.json.gz: .*cut off or damaged"):
        list(read_results(tmp_path / "x.json.gz", images, CATEGORIES, masks=False))


def test_boxes_a_rounding_outside_the_photo_are_cut(tmp_path):
    """COCO results are often rounded to a tenth of a pixel."""
    result = {**GOOD_RESULT, "bbox": [-0.05, 0, 4.1, 5], "segmentation": SEGMENT}
    (tmp_path / "x.json").write_text(json.dumps([result]))
    images = ids.Images({"7": 7}, {"7": (5, 4)}, "set")
    (chunk,) = read_results(tmp_path / "x.json", images, CATEGORIES, masks=False)
    assert chunk.boxes.tolist() == [[0, 0, 1, 1]] and chunk.masks is None


def test_uncompressed_run_lengths_are_taken(tmp_path):
    result = {"image_id": 7, "category_id": 3, "score": 0.5}
    result["segmentation"] = {"size": [5, 4], "counts": [6, 2, 12]}
    (tmp_path / "x.json").write_text(json.dumps([result]))
    images = ids.Images({"7": 7}, {}, "set")
    (chunk,) = read_results(tmp_path / "x.json", images, CATEGORIES, masks=True)
    pixels = coco_mask.decode({"size": [5, 4], "counts": chunk.masks[0]})
    assert np.argwhere(pixels).tolist() == [[1, 1], [2, 1]]
    assert chunk.boxes.tolist() == [pytest.approx([0.25, 0.2, 0.5, 0.6])]


def test_masks_that_no_submission_can_hold(tmp_path):
    box, full = [[0, 0, 1, 1]], [ONES]
    two = [["/m/a"] * 2, [0.5, 0.4], box * 2, full * 2, [[3, 2], [2, 3]]]
    images = {"a": (None, [["/m/a"], [0.5], box, full, [[3, 2]]]), "b": (None, two)}
    reader = write(tmp_path / "x.parquet", images, masks=True)
    for offline in (False, True):
        with pytest.raises(UserError, match="x.parquet: image 'b' has masks of 3x2 and of 2x3"):
            write_openimages(rows.Outgoing(reader, masks=True), tmp_path / "x.csv", offline=offline)
    images["b"] = (None, [[], [], [], [], np.zeros((0, 2))])
    reader = write(tmp_path / "x.parquet", images, masks=True)
    with pytest.raises(UserError, match="image 'b' has no detections and its size is unknown"):
        write_openimages(rows.Outgoing(reader, masks=True), tmp_path / "x.csv")
    images["b"] = (None, [["/m/a"], [0.5], box, full, [[3, 3]]])
    reader = write(tmp_path / "x.parquet", images, masks=True)
    with pytest.raises(UserError, match="image 'b', detection 0 of it: mask runs cover 6"):
        write_openimages(rows.Outgoing(reader, masks=True), tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["x.parquet"]


@pytest.mark.parametrize(("image", "label"), [("a,b", "x"), ("a", "Fire hydrant"), ("a", 'x"')])
def test_ids_that_a_submission_cannot_hold(tmp_path, image, label):
    reader = write(tmp_path / "x.parquet", {image: (None, [[label], [0.5], [[0, 0, 1, 1]]])})
    with pytest.raises(UserError, match="x.parquet: .* cannot stand in this format"):
        write_openimages(rows.Outgoing(reader), tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_numbers_of_annotation_files_and_csv_lists(tmp_path):
    content = {
        "images": [{"id": 5, "file_name": "train/0005.jpg", "height": 4, "width": 6}],
        "categories": [{"id": 9, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    images, categories = ids.read_annotations(tmp_path / "a.json")
    assert (images.numbers, images.sizes) == ({"5": 5}, {"5": (4, 6)})
    assert categories.numbers == {"cat": 9}
    assert ids.read_annotations(tmp_path / "a.json", "file_stem")[0].numbers == {"0005": 5}
    (tmp_path / "i.csv").write_text("image_id,id,height,width\nx,1,4,6\ny,2,,\n")
    images = ids.read_image_csv(tmp_path / "i.csv")
    assert (images.numbers, images.sizes) == ({"x": 1, "y": 2}, {"x": (4, 6)})
    with pytest.raises(UserError, match="i.csv: size of image 'y' is unknown"):
        ids.image_columns(images, ["x", "y"], np.array([True, True]))
    with pytest.raises(UserError, match="i.csv: no image 'z', which the table covers"):
        ids.image_columns(images, ["x", "z"], np.array([True, True]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,id\na,1\na,2\n", "label 'a' is given twice"),
        ("label,id\na,1\nb,1\n", "labels 'a' and 'b' are both 1"),
        ("label,id\na,one\n", "row 2: 'one' is no whole number"),
        ("name,id\na,1\n", "header 'name,id', expected label,id"),
    ],
)
def test_bad_lists_of_numbers(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=f"c.csv: {message}"):
        ids.read_category_csv(tmp_path / "c.csv")
