"""The detections table: what is written comes back, and broken files are refused with a reason."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.io.errors import UserError
from common.tables import (
    DetectionsReader,
    DetectionsWriter,
    read_detections,
    shard_name,
    table,
    writer,
)
from tests.remote import use_fake_store

METADATA = {"model": "r50", "split": "test", "step": 7}


def draw_images(rng, count):
    images = {}
    for index in rng.permutation(count):
        rows = rng.integers(0, 6)
        corners = np.sort(rng.random((rows, 2, 2)), axis=1).reshape(rows, 4).astype(np.float32)
        scores = (rng.integers(0, 4, rows) / 4).astype(np.float32)
        images[f"i{index}"] = ([f"/m/{c}" for c in rng.integers(0, 4, rows)], scores, corners)
    return images


def write(path, images, shards=1, **options):
    for shard in range(shards):
        with DetectionsWriter(
            path, METADATA, process_index=shard, process_count=shards, **options
        ) as writer:
            for image_id in list(images)[shard::shards]:
                writer.add(image_id, *images[image_id])


def rows_of(found):
    return [
        (found.image_ids[i], found.labels[c], score, tuple(box))
        for i, c, score, box in zip(
            found.image_index, found.label_index, found.scores, found.boxes, strict=True
        )
    ]


def expected_rows(images):
    rows = []
    for image_id in sorted(images):
        labels, scores, boxes = images[image_id]
        for i in sorted(range(len(labels)), key=lambda i, s=scores: -s[i]):
            rows.append((image_id, labels[i], scores[i], tuple(boxes[i])))
    return rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(1, 5), st.integers(1, 40))
def test_round_trip(seed, count, shards, rows):
    """Any order of images, any number of shards, any chunk size: the same sorted rows."""
    images = draw_images(np.random.default_rng(seed), count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        write(path, images, shards)
        found = read_detections(path)
        chunks = list(DetectionsReader(path).chunks(rows=rows))
        left = [name for _, _, files in os.walk(folder) for name in files if "tmp" in name]
    assert rows_of(found) == expected_rows(images)
    assert list(found.image_ids) == sorted(images)
    assert found.metadata == METADATA
    assert [row for chunk in chunks for row in rows_of(chunk)] == expected_rows(images)
    first = [chunk.image_index[0] for chunk in chunks]
    last = [chunk.image_index[-1] for chunk in chunks]
    assert all(b > a for a, b in zip(last, first[1:], strict=False)), "an image is split"
    assert not left


def test_small_row_groups_and_batches_keep_order(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP", 4)
    images = draw_images(np.random.default_rng(3), 60)
    write(tmp_path / "single.parquet", images)
    assert pq.ParquetFile(tmp_path / "single.parquet").num_row_groups > 20
    write(tmp_path / "folder", images, shards=7)
    for path in ("single.parquet", "folder"):
        reader = DetectionsReader(tmp_path / path)
        got = [row for chunk in reader.chunks(rows=9) for row in rows_of(chunk)]
        assert got == expected_rows(images)


def test_the_file_follows_the_published_contract(tmp_path):
    """Other tools read it with nothing but Parquet and JSON."""
    images = {"b": (["/m/1"], [0.5], [[0, 0.25, 0.5, 1]]), "a": ([], [], [])}
    write(tmp_path / "x.parquet", images)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.names == ["image_id", "label", "score", "xmin", "ymin", "xmax", "ymax"]
    assert [str(t) for t in table.schema.types] == ["string"] * 2 + ["float"] * 5
    assert table.to_pylist() == [
        dict(image_id="b", label="/m/1", score=0.5, xmin=0, ymin=0.25, xmax=0.5, ymax=1)
    ]
    footer = pq.read_metadata(tmp_path / "x.parquet").metadata
    assert json.loads(footer[b"detections"]) == METADATA | {"image_ids": ["a", "b"]}


def test_masks_travel_with_their_rows(tmp_path):
    box = [[0, 0, 1, 1]] * 2
    with DetectionsWriter(tmp_path / "x.parquet", {}, masks=True) as writer:
        writer.add("b", ["x", "y"], [0.1, 0.9], box, [b"low", b"high"], [[1, 2], [3, 4]])
        writer.add("a", ["z"], [0.5], box[:1], [b""], [[5, 6]])
        writer.add("c", [], [], [], [], np.zeros((0, 2)))
    found = read_detections(tmp_path / "x.parquet", masks=True)
    assert found.masks.tolist() == [b"", b"high", b"low"]
    assert found.mask_sizes.tolist() == [[5, 6], [3, 4], [1, 2]]
    assert read_detections(tmp_path / "x.parquet").masks is None
    write(tmp_path / "plain.parquet", {"a": (["x"], [0.5], box[:1])})
    with pytest.raises(UserError, match="no mask column"):
        read_detections(tmp_path / "plain.parquet", masks=True)


def test_an_interrupted_export_leaves_nothing_behind(tmp_path):
    write(tmp_path / "x.parquet", {"old": (["x"], [0.5], [[0, 0, 1, 1]])})
    with pytest.raises(KeyboardInterrupt):
        with DetectionsWriter(tmp_path / "x.parquet", METADATA) as writer:
            writer.add("new", ["x"], [0.5], [[0, 0, 1, 1]])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.parquet"]
    assert read_detections(tmp_path / "x.parquet").image_ids == ["old"]


def test_disk_full_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="x.parquet: cannot write .*No space left"):
        write(tmp_path / "x.parquet", {"a": (["x"], [0.5], [[0, 0, 1, 1]])})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("scores", "boxes", "message"),
    [
        ([np.nan], [[0, 0, 1, 1]], "row 0: score nan"),
        ([-0.1], [[0, 0, 1, 1]], "score -0.1"),
        ([87.0], [[0, 0, 1, 1]], "score 87"),
        ([0.5, 0.5], [[0, 0, 1, 1], [0.5, 0, 0.4, 1]], "row 1: inverted box"),
        ([0.5], [[0, 0, 640, 480]], "normalised"),
        ([0.5], [[0, np.nan, 1, 1]], "normalised"),
    ],
)
def test_the_writer_refuses_bad_values(tmp_path, scores, boxes, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "x.parquet", {"a": (["x"] * len(scores), scores, boxes)})
    assert os.listdir(tmp_path) == []


def test_the_writer_refuses_an_image_given_twice(tmp_path):
    with pytest.raises(UserError, match="'a' is added twice"):
        with DetectionsWriter(tmp_path / "x.parquet", {}) as writer:
            writer.add("a", [], [], [])
            writer.add("a", [], [], [])


GOOD = {
    "image_id": ["a", "a", "b"],
    "label": ["x", "y", "x"],
    "score": [0.9, 0.5, 0.7],
    "xmin": [0.0, 0.0, 0.0],
    "ymin": [0.0, 0.0, 0.0],
    "xmax": [1.0, 1.0, 1.0],
    "ymax": [1.0, 1.0, 1.0],
}


def write_raw(path, columns=None, covered=("a", "b", "c"), types=None, key=b"detections"):
    """A table as another tool would write it."""
    columns = GOOD | (columns or {})
    columns = {name: values for name, values in columns.items() if values is not None}
    kinds = table.COLUMNS | (types or {})
    arrays = {name: pa.array(values, kinds[name]) for name, values in columns.items()}
    text = covered if isinstance(covered, str) else json.dumps({"image_ids": list(covered)})
    pq.write_table(pa.table(arrays).replace_schema_metadata({key: text}), path)
    return path


def test_reads_tables_of_other_tools(tmp_path):
    assert len(read_detections(write_raw(tmp_path / "x.parquet"))) == 3
    large = {"image_id": pa.large_string(), "label": pa.large_string()}
    assert len(read_detections(write_raw(tmp_path / "y.parquet", types=large))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"score": None}}, "column score is missing, found image_id"),
        ({"types": {"score": pa.float64()}}, "column score is double, expected float"),
        ({"columns": {"label": [1, 2, 3]}, "types": {"label": pa.int64()}}, "label is int64"),
        ({"columns": {"score": [0.9, np.nan, 0.7]}}, "row 1: score nan"),
        ({"columns": {"score": [0.9, None, 0.7]}}, "row 1: score is empty"),
        ({"columns": {"image_id": ["a", None, "b"]}}, "row 1: image_id is empty"),
        ({"columns": {"score": [0.9, 0.5, 1.6]}}, r"row 2: score 1.6, expected .* \[0, 1.5\]"),
        ({"columns": {"xmin": [0, 0, 1.0], "xmax": [1, 1, 0.5]}}, "row 2: inverted box"),
        ({"columns": {"ymax": [1, 480, 1.0]}}, "row 1: box .* normalised"),
        ({"columns": {"score": [0.5, 0.9, 0.7]}}, "row 1: image 'a', score 0.9 is out of order"),
        ({"columns": {"image_id": ["b", "b", "a"]}}, "row 2: image 'a'.* out of order"),
        ({"covered": ["a"]}, "row 2: 'b' is not among the covered image ids"),
        ({"covered": ["a", "b", "a"]}, "image 'a' is covered twice"),
        ({"key": b"other"}, "file metadata 'detections'"),
        ({"covered": "no json"}, "file metadata 'detections'"),
        ({"covered": "[1]"}, "file metadata 'detections'"),
        ({"covered": [1, 2]}, "file metadata 'detections'"),
    ],
)
def test_the_reader_names_file_and_row(tmp_path, options, message):
    path = write_raw(tmp_path / "bad.parquet", **options)
    with pytest.raises(UserError, match=f"bad.parquet: .*{message}"):
        read_detections(path)


def test_row_numbers_count_through_the_file(tmp_path):
    """Also beyond the first batch of rows."""
    count = 200_000
    columns = {name: [values[0]] * count for name, values in GOOD.items()}
    columns["score"] = np.linspace(1, 0, count, dtype=np.float32)
    columns["score"][150_001] = 0.99
    path = write_raw(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match="row 150001: .* out of order"):
        read_detections(path)


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, -1])
def test_cut_files_are_refused(tmp_path, keep):
    path = write_raw(tmp_path / "x.parquet")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="x.parquet: no readable Parquet file"):
        read_detections(path)


def test_a_flipped_bit_in_the_data_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, draw_images(np.random.default_rng(0), 500))
    data = bytearray(path.read_bytes())
    score = pq.read_metadata(path).row_group(0).column(2)
    data[score.data_page_offset + score.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="x.parquet: damaged after row 0"):
        read_detections(path)


def test_incomplete_and_mixed_folders_are_refused(tmp_path):
    images = draw_images(np.random.default_rng(0), 20)
    folder = tmp_path / "export"
    write(folder, images, shards=3)
    (folder / "part-00000-of-00003.parquet.tmp-1").write_bytes(b"of a crashed export")
    assert rows_of(read_detections(folder)) == expected_rows(images)

    shard = folder / shard_name(1, 3)
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match="shard part-00001-of-00003.parquet is missing"):
        read_detections(folder)
    shard.write_bytes((folder / shard_name(0, 3)).read_bytes())
    with pytest.raises(UserError, match="part-00001-of-00003.*is covered twice"):
        read_detections(folder)
    with DetectionsWriter(folder, {"step": 8}, process_index=1, process_count=3) as writer:
        writer.add("another", [], [], [])
    with pytest.raises(UserError, match="metadata differ"):
        read_detections(folder)
    shard.write_bytes(data)
    (folder / shard_name(0, 2)).write_bytes(data)
    with pytest.raises(UserError, match="mixed"):
        read_detections(folder)
    (folder / shard_name(0, 2)).rename(folder / "mine.parquet")
    with pytest.raises(UserError, match="mine.parquet: not a shard name"):
        read_detections(folder)


def test_paths_that_hold_no_table(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_detections(tmp_path / "nothing")
    with pytest.raises(UserError, match="no shards"):
        read_detections(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        DetectionsWriter(tmp_path, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        DetectionsWriter(tmp_path / "file", {}, process_index=0, process_count=2)


def test_reads_a_range_of_images_without_the_row_groups_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP", 8)
    images = {k: v for k, v in draw_images(np.random.default_rng(3), 40).items() if len(v[1])}
    path = tmp_path / "x.parquet"
    write(path, images)
    ids = sorted(images)
    for first, stop in ((0, 5), (7, 8), (11, len(ids)), (4, 4)):
        chunks = DetectionsReader(path).chunks(rows=6, images=range(first, stop))
        expected = expected_rows({image: images[image] for image in ids[first:stop]})
        assert [row for chunk in chunks for row in rows_of(chunk)] == expected
    # Damage in the first row group does not matter to who reads the last images.
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    data[start + 10 : start + 60] = bytes(50)
    path.write_bytes(data)
    last = list(DetectionsReader(path).chunks(images=range(len(ids) - 1, len(ids))))
    assert rows_of(last[0]) == expected_rows({ids[-1]: images[ids[-1]]})
    with pytest.raises(UserError, match="damaged after row 0"):
        list(DetectionsReader(path).chunks())


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_refuses_duplicate_rows_when_asked(tmp_path, monkeypatch, rows):
    """Equal rows need not lie side by side: others of the same score may be between them."""
    path = tmp_path / "x.parquet"
    box = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.6], [0, 0, 0.5, 0.5]], np.float32)
    with DetectionsWriter(path, METADATA) as table_writer:
        table_writer.add("a", ["/m/1"] * 2, [0.5, 0.4], box[1:])
        table_writer.add("b", ["/m/1"] * 3, [0.5] * 3, box)
        table_writer.add("c", ["/m/1", "/m/2"], [0.5] * 2, box[[0, 0]])
    assert len(read_detections(path)) == 7
    monkeypatch.setattr("common.tables.reader._MIN_BATCH", 1)
    with pytest.raises(UserError, match=r"x\.parquet: row 4: the same as row 2 \(image 'b'"):
        list(DetectionsReader(path).chunks(rows=rows, refuse_duplicates=True))


def test_readers_of_the_same_images_share_their_ids(tmp_path):
    images = draw_images(np.random.default_rng(4), 9)
    write(tmp_path / "a.parquet", images)
    write(tmp_path / "b", images, shards=2)
    first = DetectionsReader(tmp_path / "a.parquet")
    second = DetectionsReader(tmp_path / "b", like=first)
    assert second.image_ids is first.image_ids and second.image_codes is first.image_codes
    rows = [row for chunk in second.chunks() for row in rows_of(chunk)]
    assert rows == expected_rows(images)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_table_behind_a_gs_address(tmp_path, monkeypatch, shards):
    """Written, replaced, read, listed: as on the local disk, and nothing is left beside it."""
    use_fake_store(monkeypatch, tmp_path / "store")
    images = draw_images(np.random.default_rng(5), 12)
    for _ in range(2):
        write("gs://bucket/run/x.parquet", images, shards=shards)
    assert rows_of(read_detections("gs://bucket/run/x.parquet")) == expected_rows(images)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) == shards and not [path for path in files if "tmp" in path.name]
    with pytest.raises(UserError, match="gs://bucket/run/y.parquet: no such file or folder"):
        read_detections("gs://bucket/run/y.parquet")
