"""LVIS re-scoring: groups of classes from what users have, and the search of the factors."""

import json

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.tables import Detections
from ensemble.rescoring import (
    COMMON,
    FREQUENT,
    RARE,
    Rescoring,
    best_rows,
    evaluator,
    read_groups,
    search,
)

LABELS = ["ant", "bee", "cow"]


def test_groups_of_an_lvis_file_a_plain_list_and_a_dataset(tmp_path):
    path = tmp_path / "lvis.json"
    categories = [
        {"id": 7, "name": "bee", "frequency": "r"}, {"id": 2, "name": "cow", "frequency": "c"},
    ]  # fmt: skip
    path.write_text(json.dumps({"info": {}, "note": "x", "images": [], "categories": categories}))
    assert read_groups(path, LABELS).tolist() == [FREQUENT, RARE, COMMON]
    path.write_text(json.dumps({"ant": "c", "cow": "r"}))
    assert read_groups(path, LABELS).tolist() == [COMMON, FREQUENT, RARE]
    with DatasetWriter(tmp_path / "set", "x", LABELS, LABELS, {"LabelName": "root"}, "") as table:
        for number in range(112):
            # Ants in 101 images of the split, bees in 10 (twice in one) and in others, cows in 11.
            classes = (
                [0] * (number < 101) + [1] * (number < 10 or number > 101) + [1] * (number < 1)
            )
            classes += [2] * (number < 11)
            boxes = np.tile([0.0, 0.0, 0.5, 0.5], (len(classes), 1)).reshape(-1, 4)
            boxes[:, 2] -= np.arange(len(classes)) / 100
            table.add_image(f"i{number}", "x.jpg", (10, 10), boxes, classes)
        table.add_split("train", range(101))
    assert read_groups(tmp_path / "set", LABELS).tolist() == [FREQUENT, RARE, COMMON]
    # A set that knows its frequencies is not counted.
    meta = json.loads((tmp_path / "set" / "dataset.json").read_text())
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(meta | {"frequency": list("rcf")}))
    assert read_groups(tmp_path / "set", LABELS).tolist() == [RARE, COMMON, FREQUENT]


def test_group_files_that_do_not_fit(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"ant": "often"}))
    with pytest.raises(UserError, match=r"x\.json: class 'ant' has frequency 'often', expected r"):
        read_groups(path, LABELS)
    path.write_text(json.dumps({"person": "r"}))
    with pytest.raises(UserError, match=r"x\.json: knows none of the 3 classes"):
        read_groups(path, LABELS)
    groups = np.zeros(3, np.int8)
    with pytest.raises(UserError, match="config.rescoring.common: found 0.0, expected more than 0"):
        Rescoring(groups, "multiplier", (1.0, 0.0, 1.0))
    with pytest.raises(UserError, match="config.rescoring.mode: found 'add'"):
        Rescoring(groups, "add", (1.0, 1.0, 1.0))


@pytest.mark.parametrize("mode", ["multiplier", "exponent"])
def test_factors_keep_the_ranking_of_a_class_and_the_range_of_scores(mode):
    rng = np.random.default_rng(0)
    classes, scores = rng.integers(0, 3, 400), rng.uniform(0, 1, 400).astype(np.float32)
    rescoring = Rescoring(np.array([FREQUENT, RARE, COMMON], np.int8), mode, (4.0, 2.0, 1.0))
    found = rescoring.apply(classes, scores)
    assert found.dtype == np.float32 and found.max() <= 1
    for label in range(3):
        rows = classes == label
        assert np.all(np.diff(found[rows][np.argsort(scores[rows])]) > 0)
    mean = [np.mean(found[classes == label] / scores[classes == label]) for label in range(3)]
    assert mean[1] > mean[2] > mean[0]


def test_best_rows_of_each_image():
    images = np.array([1, 0, 1, 1, 0])
    scores = np.array([0.2, 0.1, 0.9, 0.2, 0.5], np.float32)
    assert best_rows(images, scores, 2).tolist() == [4, 1, 2, 0]
    assert best_rows(images, scores, 0).tolist() == [4, 1, 2, 0, 3]
    assert best_rows(images[:0], scores[:0], 2).tolist() == []


def test_search_finds_factors_that_bring_rare_classes_through_the_cut(tmp_path):
    """A rare bee behind confident false ants: the cut at one row takes it away."""
    with DatasetWriter(tmp_path / "set", "x", LABELS, LABELS, {"LabelName": "root"}, "") as table:
        for number in range(3):
            table.add_image(f"i{number}", "x.jpg", (10, 10), [[0, 0, 0.5, 0.5]], [1])
        table.add_split("val", range(3))
    dataset = Dataset.open(tmp_path / "set")
    rows = Detections(
        image_ids=["i0", "i1", "i2"],
        labels=LABELS,
        image_index=np.array([0, 0, 1, 1, 2, 2], np.int32),
        label_index=np.array([0, 1] * 3, np.int32),
        scores=np.array([0.9, 0.5, 0.9, 0.4, 0.9, 0.2], np.float32),
        boxes=np.tile(np.array([0, 0, 0.5, 0.5], np.float32), (6, 1)),
        metadata={},
    )
    groups = np.array([FREQUENT, RARE, FREQUENT], np.int8)
    lines = []
    tried = search(
        rows, groups, evaluator("openimages", dataset, "val"), values=[2.0, 3.0], max_detections=1,
        say=lambda line, **_: lines.append(line),
    )  # fmt: skip
    assert len(tried) == len(lines) == 6
    by_factor = {trial["rare"]: trial["value"] for trial in tried}
    assert by_factor == pytest.approx({1.0: 0.0, 2.0: 1 / 3, 3.0: 2 / 3})
    assert (tried[0]["rare"], tried[0]["common"]) == (3.0, 1.0)
    with pytest.raises(UserError, match="--metric=voc: expected one of openimages"):
        evaluator("voc", dataset, "val")
