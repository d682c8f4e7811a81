"""Opening many tables: what belongs together is read side by side, the rest refused in one line."""

import re

import numpy as np
import pytest

from common.io.errors import UserError
from common.tables import DetectionsWriter, writer
from ensemble.chunks import aligned_chunks
from ensemble.inputs import open_tables, parse_inputs
from tests.ensemble.tables import LABELS, draw_images, write

BOX = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)


def one(label="ant", score=0.5, box=BOX):
    return ([label], [score], box)


def read_all(tables, **options):
    """Rows (image id, label, score, model) of all chunks, which must be images in order."""
    rows, images = [], []
    for chunk in aligned_chunks(tables, **options):
        images += range(chunk.first, chunk.stop)
        assert np.all((chunk.images >= chunk.first) & (chunk.images < chunk.stop))
        rows += [
            (tables.image_ids[i], tables.labels[c], float(s), tables.names[m])
            for i, c, s, m in zip(
                chunk.images, chunk.labels, chunk.scores, chunk.models, strict=True
            )
        ]
    return sorted(rows), images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for seed, name in enumerate("abc"):
        write(folder / f"{name}.parquet", draw_images(seed, count=40), shards=1)
    write(folder / "shards", draw_images(3, count=40), shards=3)
    return folder


def expected(seeds, names):
    return sorted(
        (image, label, float(score), name)
        for seed, name in zip(seeds, names, strict=True)
        for image, (labels, scores, _) in draw_images(seed, count=40).items()
        for label, score in zip(labels, scores, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 50, 1 << 19])
def test_chunks_hold_whole_images_of_all_tables(folder, monkeypatch, rows):
    monkeypatch.setattr("ensemble.chunks._MIN_ROWS", 1)
    tables = open_tables([str(folder / n) for n in ("a.parquet", "b.parquet", "shards")])
    assert tables.names == ["a", "b", "shards"] and tables.labels == sorted(LABELS)
    found, images = read_all(tables, rows=rows)
    assert found == expected((0, 1, 3), tables.names)
    assert images == list(range(40))


def test_ranges_of_images_cut_the_work_into_parts_for_hosts(folder, monkeypatch):
    monkeypatch.setattr("ensemble.chunks._MIN_ROWS", 1)
    tables = open_tables([str(folder / "a.parquet"), f"second={folder / 'c.parquet'}"])
    assert tables.names == ["a", "second"]
    parts = [range(0, 13), range(13, 13), range(13, 40)]
    found = [read_all(tables, rows=30, images=part) for part in parts]
    assert sorted(sum((rows for rows, _ in found), [])) == expected((0, 2), tables.names)
    assert [images for _, images in found] == [list(part) for part in parts]


def test_covered_images_decide(tmp_path):
    write(tmp_path / "a.parquet", {"x": one(), "y": one(), "z": one()})
    write(tmp_path / "b.parquet", {"w": one(), "y": one(score=0.25), "z": ([], [], BOX[:0])})
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    with pytest.raises(UserError, match=r"b\.parquet: covers 3 images, .*a\.parquet 3: 'x' is mis"):
        open_tables(paths)
    union, images = read_all(open_tables(paths, coverage="union"))
    assert [row[0] for row in union] == ["w", "x", "y", "y", "z"] and images == [0, 1, 2, 3]
    both, images = read_all(open_tables(paths, coverage="intersection"))
    assert [row[::2] for row in both] == [("y", 0.25), ("y", 0.5), ("z", 0.5)] and len(images) == 2
    assert read_all(open_tables(paths, coverage="union"), images=range(1, 2))[0] == union[1:2]
    write(tmp_path / "c.parquet", {"q": one()})
    with pytest.raises(UserError, match=r"c\.parquet: covers none of the images of"):
        open_tables([paths[0], str(tmp_path / "c.parquet")], coverage="intersection")


def test_mapping_of_another_vocabulary(tmp_path):
    write(tmp_path / "a.parquet", {"x": one("ant")})
    write(tmp_path / "b.parquet", {"x": (["1", "2", "3"], [0.6, 0.5, 0.4], BOX.repeat(3, 0))})
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    with pytest.raises(UserError, match=r"a\.parquet: shares no label with the other tables"):
        open_tables(paths)
    mappings = {"b": {"1": ["ant"], "2": ["bee", "cow"], "4": ["emu"]}}
    rows, _ = read_all(open_tables(paths, mappings=mappings))
    assert [row[1:] for row in rows] == [
        ("ant", 0.5, "a"), ("ant", pytest.approx(0.6), "b"), ("bee", 0.5, "b"), ("cow", 0.5, "b"),
    ]  # fmt: skip
    # Targets outside the dataset's classes are left out like labels without a target.
    rows, _ = read_all(open_tables(paths, mappings=mappings, labels=["cow", "ant"]))
    assert [row[1] for row in rows] == ["ant", "ant", "cow"]
    with pytest.raises(UserError, match="mapping: no input is called 'd', expected one of a, b"):
        open_tables(paths, mappings={"d": {"1": ["ant"]}})
    with pytest.raises(UserError, match="the mapping of b leads from none of its labels"):
        open_tables(paths, mappings={"b": {"9": ["ant"]}})


def test_labels_that_are_no_class_of_the_dataset_are_refused_before_work_starts(tmp_path):
    images = {"x": one("ant"), "y": one("yak")}
    path = write(tmp_path / "a.parquet", images)
    with pytest.raises(UserError, match=r"a\.parquet: row 1: 'yak' is not among the 3 classes"):
        open_tables([path], labels=LABELS)


def test_tables_that_do_not_belong_together(tmp_path):
    full = write(tmp_path / "a.parquet", {"x": one()})
    empty = write(tmp_path / "empty.parquet", {"x": ([], [], BOX[:0])})
    expanded = write(tmp_path / "expanded.parquet", {"x": one()}, expanded=True)
    cases = {
        (empty,): r"empty\.parquet: no detections in any table, expected rows",
        (full, expanded): r"a\.parquet: not expanded to parent classes, but .*expanded\.parquet",
        (full, full): r"--inputs: .*a\.parquet is given twice",
        (full, str(tmp_path / "none.parquet")): r"none\.parquet: no such file or folder",
        (f"m={full}", f"m={expanded}"): r"--inputs: two tables are called 'm', expected name=path",
        (): "--inputs: no tables",
    }
    for inputs, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_tables(inputs)
        assert "\n" not in str(error.value)


def test_a_table_without_rows_is_taken_beside_others(tmp_path):
    full = write(tmp_path / "a.parquet", {"x": one()})
    empty = write(tmp_path / "empty.parquet", {"x": ([], [], BOX[:0])})
    rows, _ = read_all(open_tables([full, empty]))
    alone, _ = read_all(open_tables([full]))
    assert rows == alone


def test_models_are_called_by_what_tells_their_paths_apart():
    assert parse_inputs(["r/a/5/val.parquet", "r/b/5/val.parquet"])[1] == ["a/5/val", "b/5/val"]
    assert parse_inputs(["r/a.parquet", "n=r/b.parquet", "r/shards"])[1] == ["a", "n", "shards"]


def test_broken_rows_name_file_and_row(tmp_path, monkeypatch):
    """Found while reading, in whatever chunk they are."""
    good = write(tmp_path / "good.parquet", {f"i{n}": one() for n in range(9)})
    rules = writer.find_invalid
    bad = {
        "nan score": (one(score=np.nan), "score nan, expected a number in"),
        "range": (one(score=55.0), "score 55, expected a number in"),
        "nan box": (one(box=BOX * np.nan), "expected coordinates normalised"),
        "pixels": (one(box=BOX * 640), "expected coordinates normalised"),
        "inverted": (one(box=BOX[:, [2, 1, 0, 3]]), "inverted box"),
    }
    for name, (rows, message) in bad.items():
        monkeypatch.setattr(writer, "find_invalid", lambda *_: None)
        path = write(
            tmp_path / f"{name}.parquet", {f"i{n}": one() for n in range(8)} | {"i8": rows}
        )
        monkeypatch.setattr(writer, "find_invalid", rules)
        with pytest.raises(UserError, match=rf"{name}\.parquet: row 8: .*{re.escape(message)}"):
            read_all(open_tables([good, path]))


def test_duplicate_rows_and_truncated_files(tmp_path):
    path = tmp_path / "twice.parquet"
    with DetectionsWriter(path, {"model": "m"}) as table:
        table.add("x", ["ant", "bee", "ant"], [0.5] * 3, BOX.repeat(3, 0))
    with pytest.raises(UserError, match=r"twice\.parquet: row 2: the same as row 0 \(image 'x'"):
        read_all(open_tables([str(path)]))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"twice\.parquet: no readable Parquet file, cut or dam"):
        open_tables([str(path)])
