"""Tables and results that are damaged, or made to fill memory: one line that names the file."""

import base64
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.io.errors import UserError
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.tables.exchange import ids
from common.tables.exchange.openimages_csv import read_openimages
from common.tables.exchange.results_json import read_results, write_results
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Importer

CATEGORIES = ids.Categories({"oak": 1, "elm": "e2"}, "set")
IMAGES = ids.Images({"p7": 7, "q": "q"}, {"p7": (40, 60), "q": (40, 60)}, "set")


def columns(**changes):
    table = {
        "image_id": pa.array(["a"]),
        "label": pa.array(["oak"]),
        "score": pa.array([0.5], pa.float32()),
        **{name: pa.array([0.1], pa.float32()) for name in ("xmin", "ymin")},
        **{name: pa.array([0.9], pa.float32()) for name in ("xmax", "ymax")},
        "mask": pa.array([b"123"], pa.binary()),
        **{name: pa.array([9], pa.int32()) for name in ("mask_height", "mask_width")},
    }
    return table | changes


def save(path, table, metadata='{"image_ids": ["a"]}'):
    table = table.replace_schema_metadata({"detections": metadata})
    pq.write_table(table, path, compression="zstd")
    return path


@pytest.mark.parametrize(
    ("table", "metadata", "message"),
    [
        ({"label": pa.array([b"\xff"]).view(pa.string())}, None, "damaged after row 0 .*UTF8"),
        ({"mask": pa.array([bytes(1 << 27)])}, None, "masks of 1.* bytes in"),
        ({}, '{"image_ids": {"a": 1}}', "image_ids are no list"),
        ({}, "[" * 100_000, "x.parquet.*nested too deep"),
        ({}, '{"image_ids": ["\\ud800"]}', "x.parquet.*no valid JSON"),
        ({}, "[1]", "expected a JSON object"),
    ],
)
def test_damaged_tables(tmp_path, table, metadata, message):
    path = tmp_path / "x.parquet"
    save(path, pa.table(columns(**table)), metadata or '{"image_ids": ["a"]}')
    with pytest.raises(UserError, match=message) as caught:
        read_detections(path, masks=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["image_id", "label", "mask"])
def test_texts_that_the_schema_calls_truth_values(tmp_path, name):
    """pyarrow would end the process when it is asked for the sizes of such a column."""
    path = save(tmp_path / "x.parquet", pa.table(columns()))
    data, end = path.read_bytes(), bytes([len(name)]) + name.encode()
    texts, truths = (b"\x15" + kind + b"\x25\x02\x18" + end for kind in (b"\x0c", b"\x00"))
    assert texts in data
    path.write_bytes(data.replace(texts, truths))
    with pytest.raises(UserError, match=r"x\.parquet: ") as caught:
        read_detections(path, masks=True)
    assert "\n" not in str(caught.value)


def test_a_column_twice(tmp_path):
    table = pa.table(columns())
    path = save(tmp_path / "x.parquet", table.append_column("score", table["score"]))
    with pytest.raises(UserError, match="column score is there twice"):
        DetectionsReader(path)


def test_masks_in_csv_are_no_longer_than_their_frame_can_need(tmp_path):
    bomb = base64.b64encode(zlib.compress(b"0" * (1 << 28))).decode()
    path = tmp_path / "x.csv"
    head = "ImageID,ImageWidth,ImageHeight,PredictionString\n"
    for row, message in (
        (f"a,3,4,oak 0.5 {bomb}", "more than 91 characters for 4x3 pixels"),
        (f"a,{'9' * 30},4,oak 0.5 {bomb}", "expected pixels"),
    ):
        path.write_text(f"{head}{row}\n")
        importer = Importer(path, masks=True)
        rows = read_openimages(path, masks=True, cover=importer.cover)
        with pytest.raises(UserError, match=f"row 2: .*{message}"):
            importer.write(rows, tmp_path / "x.parquet", {})


def imported(tmp_path, results):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results))
    count, _ = Importer(path).write(
        read_results(path, IMAGES, CATEGORIES, masks=False), tmp_path / "r.parquet", {}
    )
    table = read_detections(tmp_path / "r.parquet")
    labels = [table.labels[i] for i in table.label_index]
    return count, [table.image_ids[i] for i in table.image_index], labels


def test_ids_of_results_are_texts_and_equal_rows_are_one(tmp_path):
    row = {"bbox": [1, 2, 3, 4], "score": 0.5}
    results = [
        row | {"image_id": image, "category_id": category}
        for image, category in ((7, "1"), ("007", 1.0), ("p7", "elm"), ("q", "e2"))
    ]
    count, images, labels = imported(tmp_path, results)
    assert (count, images, labels) == (3, ["p7", "p7", "q"], ["oak", "elm", "elm"])
    with pytest.raises(UserError, match="row 1: image_id '8' is not in set"):
        imported(tmp_path, [results[0] | {"image_id": "8"}])


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": None},
        {"image_id": 10**40},
        {"category_id": [1]},
        {"bbox": 3},
        {"bbox": [1, 2, 3, 10**400]},
        {"score": "high"},
        {"bbox": None, "segmentation": {"size": [1 << 40, 1], "counts": [1]}},
        {"bbox": None, "segmentation": {"size": [3, 4], "counts": [10**30]}},
        {"bbox": None, "segmentation": {"size": [3, 4], "counts": "\ud800"}},
    ],
)
def test_results_of_wrong_values_are_named_by_row(tmp_path, change):
    row = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    with pytest.raises(UserError, match=r"r\.json: (row 1|no valid JSON)") as caught:
        imported(tmp_path, [row | change])
    assert "\n" not in str(caught.value)


def test_ids_that_are_texts_are_written_as_texts(tmp_path):
    with DetectionsWriter(tmp_path / "x.parquet", {}) as writer:
        box = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)
        for image_id, label in (("p7", "oak"), ("q", "elm")):
            writer.add(image_id, [label], np.array([0.5], np.float32), box)
    outgoing = Outgoing(DetectionsReader(tmp_path / "x.parquet"))
    write_results(outgoing, tmp_path / "x.json", IMAGES, CATEGORIES)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(7, 1), ("q", "e2")]
