"""COCO results as inputs and output of merging: ids are the dataset's, photos without rows stay."""

import json

import numpy as np
import pytest

from common.data.dataset import DatasetWriter
from common.io.errors import UserError
from common.tables import read_detections
from configs.ensemble import naive
from ensemble.merge import merge_tables
from ensemble.results_files import as_results, as_tables

QUIET = dict(say=lambda *_, **__: None)


@pytest.fixture
def dataset(tmp_path):
    """Photos 7, 8 and 12 of 100 x 200 pixels; classes 17 and 18."""
    labels, tree = ["cat", "dog"], {"LabelName": "root", "Subcategory": []}
    extra = {"category_ids": [17, 18]}
    with DatasetWriter(tmp_path / "set", "pets", labels, labels, tree, "", extra=extra) as writer:
        rows = [
            writer.add_image(name, "x.jpg", (100, 200), [[0, 0, 0.5, 0.5]], [0])
            for name in ("12", "7", "8")
        ]
        writer.add_split("val", rows)
    return str(tmp_path / "set")


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def write(path, results):
    path.write_text(json.dumps(results))
    return path


def test_results_in_results_out(dataset, tmp_path):
    a = write(tmp_path / "a.v1.json", [result(7, 17, [0, 0, 100, 50], 0.75)])
    # Beyond the photo: cut at its edge.
    b = write(tmp_path / "b.json", [result(12, 18, [-10, 20, 60, 40], 0.5)])
    output = str(tmp_path / "m.json")
    with as_tables([str(a), f"second={b}"], dataset, **QUIET) as inputs:
        assert [text.partition("=")[0] for text in inputs] == ["a", "second"]
        table = read_detections(inputs[1].partition("=")[2])
        assert sorted(table.image_ids) == ["12", "7", "8"]
        with as_results(output, dataset) as table:
            config = naive.get_config()
            config.dataset = dataset
            merge_tables(inputs, config, table, **QUIET)
    found = sorted(json.loads((tmp_path / "m.json").read_text()), key=lambda r: r["image_id"])
    assert [(r["image_id"], r["category_id"]) for r in found] == [(7, 17), (12, 18)]
    np.testing.assert_allclose([r["score"] for r in found], [0.75, 0.5])
    np.testing.assert_allclose(found[0]["bbox"], [0, 0, 100, 50], atol=1e-4)
    np.testing.assert_allclose(found[1]["bbox"], [0, 20, 50, 40], atol=1e-4)


def test_tables_pass_as_they_are(tmp_path):
    with as_tables(["a=x.parquet", "y"], "") as inputs, as_results("m.parquet", "") as output:
        assert inputs == ["a=x.parquet", "y"] and output == "m.parquet"


def test_what_is_missing_is_named(dataset, tmp_path):
    path = write(tmp_path / "a.json", [result(99, 17, [0, 0, 9, 9], 0.5)])
    with pytest.raises(UserError, match="results need a dataset directory"):
        with as_tables([str(path)], ""):
            pass
    with pytest.raises(UserError, match="a.json: .*99"):
        with as_tables([str(path)], dataset, **QUIET):
            pass
    with pytest.raises(UserError, match="b.json: no such file"):
        with as_tables([f"b={tmp_path / 'b.json'}"], dataset, **QUIET):
            pass
    assert not (tmp_path / "m.json").exists()
    with pytest.raises(ZeroDivisionError):
        with as_results(str(tmp_path / "m.json"), dataset):
            raise ZeroDivisionError
    assert not (tmp_path / "m.json").exists()
