"""Submission and result files: what is written comes back, and reads as official tools read it."""

import base64
import csv
import gzip
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

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.tables.exchange import ids, rows, spool
from common.tables.exchange.openimages_csv import read_openimages, write_openimages
from common.tables.exchange.results_json import read_results, write_results
from common.tables.exchange.spool import Importer
from common.tables.exchange.yolo_labels import read_labels, write_labels

LABELS = ["/m/a", "/m/b", "/m/c"]
CATEGORIES = ids.Categories({"/m/a": 7, "/m/b": 3, "/m/c": 90}, "set")


def draw(seed, count, *, masks=False, top=1.0):
    """Images of several sizes, some without detections: id -> size, arguments of writer.add."""
    rng = np.random.default_rng(seed)
    images = {}
    for number in rng.permutation(np.arange(1, count + 1) * 7).tolist():
        size = rng.integers(1, 60, 2).tolist()
        n = int(rng.integers(0, 5))
        corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
        scores = (rng.integers(1, 9, n) / 8 * top).astype(np.float32)
        content = [[LABELS[c] for c in rng.integers(0, 3, n)], scores, corners]
        if masks:
            pixels = [rng.random(size) < rng.choice([0, 0.1, 0.9, 1]) for _ in range(n)]
            codes = [coco_mask.encode(np.asfortranarray(p, np.uint8))["counts"] for p in pixels]
            content += [codes, np.broadcast_to(size, (n, 2))]
        images[str(number)] = (size, content)
    return images


def write(path, images, *, masks=False):
    with DetectionsWriter(path, {"model": "m"}, masks=masks) as writer:
        for image_id, (_, content) in images.items():
            writer.add(image_id, *content)
    return DetectionsReader(path)


def numbers_of(images):
    return ids.Images(
        {i: int(i) for i in images}, {i: tuple(size) for i, (size, _) in images.items()}, "set"
    )


def table_rows(path, masks=False):
    found = read_detections(path, masks=masks)
    columns = [found.image_index, found.label_index, found.scores, found.boxes]
    columns += [found.masks, found.mask_sizes] if masks else []
    return [
        (found.image_ids[i], found.labels[c], float(s), tuple(b.tolist()), *map(list, extra))
        for i, c, s, b, *extra in zip(*columns, strict=True)
    ]


def read_back(path, output, *, covered=None, masks=False, **options):
    importer = Importer(path, covered, "split 'x'", masks=masks, **options)
    importer.write(read_openimages(path, masks=masks, cover=importer.cover), output, {})
    return output


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


def test_yolo_labels_there_and_back(tmp_path):
    images = draw(5, 9)
    reader = write(tmp_path / "x.parquet", images)
    with DatasetWriter(tmp_path / "set", "s", LABELS, LABELS, None) as writer:
        for number, image_id in enumerate(images):
            writer.add_image(image_id, "one.jpg" if number < 2 else f"day{number}/photo.jpg")
    dataset = Dataset.open(tmp_path / "set")
    write_labels(rows.Outgoing(reader), tmp_path / "labels", dataset)
    files = {
        p.relative_to(tmp_path / "labels").as_posix() for p in (tmp_path / "labels").rglob("*.txt")
    }
    first = list(images)[:2]  # of one photo: called by their ids
    assert files == {f"{i}.txt" for i in first} | {f"day{n}/photo.txt" for n in range(2, 9)}
    importer = Importer(tmp_path / "labels")
    back = tmp_path / "y.parquet"
    importer.write(read_labels(tmp_path / "labels", dataset, importer.cover), back, {})
    found, expected = read_detections(back), read_detections(reader.path)
    assert found.image_ids == expected.image_ids
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-7)
    names = [[t.labels[i] for i in t.label_index] for t in (found, expected)]
    assert names[0] == names[1]
    # The folder may be that of the true labels.
    with pytest.raises(UserError, match="labels: exists already, expected a new folder"):
        write_labels(rows.Outgoing(reader), tmp_path / "labels", dataset)


@pytest.mark.parametrize(
    ("image_ids", "message"),
    [
        (("../../x",), "'../../x', expected an id to call a file by"),
        (("/x",), "'/x', expected an id to call a file by"),
        (("photo", "b"), "2 images have the file 'photo'.txt"),
    ],
)
def test_yolo_labels_stay_in_their_folder_and_apart(tmp_path, image_ids, message):
    """Ids are other people's texts: one may be a path to elsewhere, or that of another photo."""
    with DatasetWriter(tmp_path / "set", "s", LABELS, LABELS, None) as writer:
        for image_id, file in zip(image_ids, ("/elsewhere.jpg", "photo.jpg"), strict=False):
            writer.add_image(image_id, file)
    with DetectionsWriter(tmp_path / "x.parquet", {}) as table:
        table.add(image_ids[0], LABELS[:1], [0.5], [[0, 0, 1, 1]])
    outgoing = rows.Outgoing(DetectionsReader(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=message):
        write_labels(outgoing, tmp_path / "labels", Dataset.open(tmp_path / "set"))
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a", "0 0.5 0.5 0.1", r"a.txt: row 1: found .* \(4 numbers\)"),
        ("a", "\n9 0.5 0.5 0.1 0.1 1", "a.txt: row 1: .*class 9 is unknown"),
        ("a", "0 0.5 0.5 0.1 0.1 nan", "a.txt: row 1: "),
        ("a", "0 0.5 0.5 0.1 0.1 7", "row 1: score 7"),
        ("a", "0 0.9 0.5 0.5 0.1 1", "row 1: box .*--clip"),
        ("b", "", "b.txt: no photo of .* called b"),
    ],
)
def test_broken_yolo_labels_are_named(tmp_path, name, text, message):
    with DatasetWriter(tmp_path / "set", "s", LABELS, LABELS, None) as writer:
        writer.add_image("1", "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / f"{name}.txt").write_text(text)
    importer = Importer(tmp_path / "labels")
    found = read_labels(tmp_path / "labels", Dataset.open(tmp_path / "set"), importer.cover)
    with pytest.raises(UserError, match=message):
        importer.write(found, tmp_path / "y.parquet", {})
