"""Folders of YOLO labels, in both directions."""

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.tables.exchange import rows
from common.tables.exchange.spool import Importer
from common.tables.exchange.yolo_labels import read_labels, write_labels
from tests.common.tables.exchanged import LABELS, draw, write


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
