"""Submission and result files: what is written comes back, and reads as official tools read it."""

import base64
import csv
import io
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tables import read_detections
from common.tables.exchange import ids, rows, spool
from common.tables.exchange.openimages_csv import write_openimages
from common.tables.exchange.results_json import read_results, write_results
from common.tables.exchange.spool import Importer
from tests.common.tables.exchanged import CATEGORIES, draw, numbers_of, read_back, table_rows, write


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans(), st.booleans())
def test_openimages_round_trip(seed, count, offline, compressed):
    images = draw(seed, count)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reader = write(folder / "x.parquet", images)
        output = folder / ("x.csv.gz" if compressed else "x.csv")
        write_openimages(rows.Outgoing(reader), output, offline=offline)
        covered = sorted(images) if offline else None
        back = read_back(output, folder / "y.parquet", covered=covered)
        assert table_rows(back) == table_rows(reader.path)
        assert read_detections(back).image_ids == sorted(images)
        assert sorted(os.listdir(folder)) == sorted(["x.parquet", output.name, "y.parquet"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 10), st.sampled_from(["boxes", "masks", "both"]))
def test_results_round_trip(seed, count, geometry):
    images = draw(seed, count, masks=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reader = write(folder / "x.parquet", images, masks=True)
        numbers = numbers_of(images)
        masks = geometry != "boxes"
        outgoing = rows.Outgoing(reader, masks=masks)
        write_results(outgoing, folder / "x.json", numbers, CATEGORIES, geometry=geometry)
        importer = Importer(folder / "x.json", sorted(images), "set", masks=masks)
        chunks = read_results(folder / "x.json", numbers, CATEGORIES, masks=masks)
        assert importer.write(chunks, folder / "y.parquet", {}) == (reader.num_rows, count)
        found = table_rows(folder / "y.parquet", masks)
        expected = table_rows(reader.path, masks)
        if geometry == "masks":  # boxes are those of the masks
            found, expected = ([(*r[:3], *r[4:]) for r in rows] for rows in (found, expected))
        assert found == expected


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_masks_in_csv_are_what_the_evaluator_decodes(seed, count, offline):
    """Submission or offline file: the same pixels, sizes, scores and boxes around the masks."""
    images = draw(seed, count, masks=True)
    sizes = {image_id: tuple(size) for image_id, (size, _) in images.items()}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reader = write(folder / "x.parquet", images, masks=True)
        outgoing = rows.Outgoing(reader, masks=True)
        write_openimages(outgoing, folder / "x.csv", offline=offline, sizes=sizes)
        parsed = []
        with open(folder / "x.csv", newline="") as file:
            for row in csv.DictReader(file):
                size = [int(row["ImageHeight"]), int(row["ImageWidth"])]
                assert size == images[row["ImageID"]][0]
                if offline:
                    words = [row["LabelName"], row["Score"], row["Mask"]]
                else:
                    words = row["PredictionString"].split(" ") if row["PredictionString"] else []
                for label, score, mask in zip(words[::3], words[1::3], words[2::3], strict=True):
                    counts = zlib.decompress(base64.b64decode(mask))
                    pixels = coco_mask.decode({"size": size, "counts": counts})
                    parsed.append((row["ImageID"], label, np.float32(score), pixels))
        back = read_back(folder / "x.csv", folder / "y.parquet", masks=True)
        written, found = table_rows(reader.path, True), table_rows(back, True)
        assert [(i, c, s) for i, c, s, _ in parsed] == [row[:3] for row in written]
        assert [row[:3] + row[4:] for row in found] == [row[:3] + row[4:] for row in written]
        for (_, _, _, pixels), row in zip(parsed, found, strict=True):
            height, width = pixels.shape
            y, x = np.nonzero(pixels)
            box = (0.0,) * 4
            if len(x):
                box = (x.min() / width, y.min() / height)
                box += ((x.max() + 1) / width, (y.max() + 1) / height)
            assert row[3] == pytest.approx(box, abs=1e-6)


def test_a_submission_as_the_challenge_describes_it(tmp_path):
    box = [[0, 0.25, 0.5, 1]]
    images = {
        "b": (None, [["/m/a", "/m/b"], [0.5, 1.25], box * 2]),
        "a": (None, [[], [], []]),
        "z": (None, [[], [], []]),
    }
    outgoing = rows.Outgoing(write(tmp_path / "x.parquet", images))
    write_openimages(outgoing, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == (
        "ImageId,PredictionString\na,\nb,/m/b 1 0 0.25 0.5 1 /m/a 0.5 0 0.25 0.5 1\nz,\n"
    )
    notes = []
    outgoing.tell(notes.append)
    assert outgoing.clipped == 1 and "1 scores above 1 are written as 1" in notes[0]
    keep = rows.Outgoing(outgoing.reader, scores="keep")
    write_openimages(keep, tmp_path / "y.csv", offline=True)
    assert (tmp_path / "y.csv").read_text() == (
        "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n"
        "b,/m/b,1.25,0,0.5,0.25,1\nb,/m/a,0.5,0,0.5,0.25,1\n"
    )
    scaled = rows.Outgoing(outgoing.reader, scores="scale")
    write_openimages(scaled, tmp_path / "z.csv", digits=3)
    assert "b,/m/b 0.833 0 0.25 0.5 1 /m/a 0.333 0" in (tmp_path / "z.csv").read_text()


def test_offline_file_reads_with_the_evaluators_columns(tmp_path):
    pandas = pytest.importorskip("pandas", reason="the official offline evaluator reads with it")
    images = draw(1, 10)
    reader = write(tmp_path / "x.parquet", images)
    write_openimages(rows.Outgoing(reader), tmp_path / "x.csv", offline=True)
    data = pandas.read_csv(tmp_path / "x.csv", dtype={"ImageID": str})
    assert [
        (i, c, np.float32(s), tuple(np.float32(b)))
        for i, c, s, b in zip(
            data["ImageID"],
            data["LabelName"],
            data["Score"],
            data[["XMin", "YMin", "XMax", "YMax"]].to_numpy(),
            strict=True,
        )
    ] == table_rows(reader.path)


def test_only_selected_images_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_CHUNK", 3)
    images = draw(4, 20)
    reader = write(tmp_path / "x.parquet", images)
    for chosen in (np.arange(20) % 3 == 0, np.arange(20) < 1, np.arange(20) > 18):
        write_openimages(rows.Outgoing(reader, chosen), tmp_path / "x.csv")
        lines = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text())))[1:]
        wanted = [image_id for image_id, c in zip(reader.image_ids, chosen, strict=True) if c]
        assert [line[0] for line in lines] == wanted
        kept = [row for row in table_rows(reader.path) if row[0] in wanted]
        assert table_rows(read_back(tmp_path / "x.csv", tmp_path / "y.parquet")) == kept


def test_coco_results_are_what_pycocotools_loads(tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="reads results as the server does")
    images = draw(2, 12, masks=True)
    reader = write(tmp_path / "x.parquet", images, masks=True)
    ground = coco.COCO()
    ground.dataset = {
        "info": {},
        "images": [{"id": int(i), "height": s[0], "width": s[1]} for i, (s, _) in images.items()],
        "annotations": [],
        "categories": [{"id": n} for n in CATEGORIES.numbers.values()],
    }
    ground.createIndex()
    for geometry in ("boxes", "masks"):
        outgoing = rows.Outgoing(reader, masks=geometry == "masks")
        path = tmp_path / f"{geometry}.json"
        write_results(outgoing, path, numbers_of(images), CATEGORIES, geometry=geometry)
        loaded = ground.loadRes(str(path)).dataset["annotations"]
        expected = table_rows(reader.path, True)
        assert len(loaded) == len(expected)
        for found, (image_id, label, score, box, mask, size) in zip(loaded, expected, strict=True):
            assert found["image_id"] == int(image_id)
            assert found["category_id"] == CATEGORIES.numbers[label]
            assert np.float32(found["score"]) == np.float32(score)
            height, width = images[image_id][0]
            if geometry == "masks":
                assert found["segmentation"]["size"] == size
                assert found["segmentation"]["counts"].encode() == bytes(mask)
                code = {"size": size, "counts": bytes(mask)}
                assert found["area"] == coco_mask.decode(code).sum()
            else:
                x0, y0, x1, y1 = box
                pixels = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                assert found["bbox"] == pixels


def test_lvis_takes_the_best_300(tmp_path):
    scores = np.linspace(1, 0.1, 400, dtype=np.float32)
    box = np.tile(np.float32([[0.1, 0.1, 0.9, 0.9]]), (400, 1))
    images = {"5": ((50, 40), [["/m/a"] * 400, scores, box]), "3": ((9, 9), [[], [], []])}
    reader = write(tmp_path / "x.parquet", images)
    outgoing = rows.Outgoing(reader, max_per_image=300)
    write_results(outgoing, tmp_path / "x.json", numbers_of(images), CATEGORIES)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [np.float32(row["score"]) for row in found] == scores[:300].tolist()
    assert (outgoing.written, outgoing.cut) == (300, 100)


def test_no_detections_at_all(tmp_path):
    reader = write(tmp_path / "x.parquet", {"5": (None, [[], [], []]), "3": (None, [[], [], []])})
    write_openimages(rows.Outgoing(reader), tmp_path / "x.csv")
    back = read_back(tmp_path / "x.csv", tmp_path / "y.parquet")
    assert read_detections(back).image_ids == ["3", "5"] and not len(read_detections(back))
    images = ids.Images({"3": 3, "5": 5}, {"3": (1, 1), "5": (1, 1)}, "set")
    write_results(rows.Outgoing(reader), tmp_path / "x.json", images, CATEGORIES)
    assert json.loads((tmp_path / "x.json").read_text()) == []


def test_rows_in_any_order_and_many_spool_files(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_BUCKET_BYTES", 100)
    images = draw(3, 40, masks=True)
    reader = write(tmp_path / "x.parquet", images, masks=True)
    write_openimages(rows.Outgoing(reader, masks=True), tmp_path / "x.csv", offline=True)
    header, *lines = (tmp_path / "x.csv").read_text().splitlines()
    np.random.default_rng(0).shuffle(lines)
    (tmp_path / "x.csv").write_text("\n".join([header, *lines]))
    back = read_back(tmp_path / "x.csv", tmp_path / "y.parquet", masks=True)

    def without_boxes(path):
        return sorted((*r[:3], bytes(r[4]), tuple(r[5])) for r in table_rows(path, True))

    assert without_boxes(back) == without_boxes(reader.path)
    assert sorted(os.listdir(tmp_path)) == ["x.csv", "x.parquet", "y.parquet"]
