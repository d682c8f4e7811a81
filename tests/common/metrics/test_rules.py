"""Reports and searches judge detections as the metric of the dataset does."""

import json

import numpy as np
import pytest

from common.data.dataset import CROWD, GROUP_OF, NOT_EXHAUSTIVE, PRESENT, Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics import openimages
from common.metrics.coco import evaluate_coco
from common.metrics.openimages import MEAN_AP, evaluate_openimages
from common.metrics.rules import make_rule, metric_of
from common.report.analysis import analyse
from common.report.scope import open_scope
from common.tables import DetectionsReader, DetectionsWriter

LABELS = ["cat", "dog", "cow"]
BOX, OTHER = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]


def build(folder, **extra) -> Dataset:
    """A cat in "a", a crowd of dogs in "b"; cows have boxes nowhere else than in "c"."""
    with DatasetWriter(folder, "set", LABELS, LABELS, None, "", extra=extra) as writer:
        writer.add_image("a", "a.jpg", (100, 100), [BOX], [0])
        writer.add_image("b", "b.jpg", (100, 100), [BOX], [1], [CROWD | GROUP_OF])
        writer.add_image(
            "c", "c.jpg", (100, 100), [BOX, OTHER], [1, 2],
            label_classes=[2, 1], label_confidences=[NOT_EXHAUSTIVE, PRESENT],
        )  # fmt: skip
        writer.add_split("val", [0, 1, 2])
    return Dataset.open(folder)


@pytest.fixture
def table(tmp_path):
    with DetectionsWriter(tmp_path / "x.parquet", {}) as writer:
        # A dog where nobody says that there is none, one in the crowd, a second cow.
        writer.add("a", ["cat", "dog"], [0.5, 0.9], [BOX, BOX])
        writer.add("b", ["dog"], [0.8], [BOX])
        writer.add("c", ["dog", "cow", "cow"], [0.7, 0.6, 0.9], [BOX, OTHER, BOX])
    return tmp_path / "x.parquet"


def judged(dataset: Dataset, table, metric: str) -> float:
    """mAP at IoU 0.5 by the rule, as the report counts it."""
    quiet = dict(say=lambda *_: None)
    readers = [DetectionsReader(table)]
    scope = open_scope(
        dataset,
        "val",
        readers,
        train_split=None,
        metric=metric or None,
        allow_partial=False,
        **quiet,
    )
    return analyse(scope, readers[0], "x", **quiet).official["mAP@0.5"]


def test_a_dataset_says_by_which_metric_it_is_judged(tmp_path):
    assert metric_of(build(tmp_path / "a")) == "openimages"
    assert metric_of(build(tmp_path / "b", exhaustive=True)) == "coco"
    assert metric_of(build(tmp_path / "c", frequency=["r", "c", "f"])) == "lvis"
    with pytest.raises(UserError, match="no frequency of the classes"):
        make_rule(build(tmp_path / "d"), "lvis")
    with pytest.raises(UserError, match="--metric=voc: expected one of openimages, coco, lvis"):
        make_rule(build(tmp_path / "e"), "voc")


def test_where_all_classes_are_annotated_absent_ones_are_wrong(tmp_path, table):
    dataset = build(tmp_path / "set", exhaustive=True)
    official = evaluate_coco(dataset, "val", table, say=lambda *_: None)
    # dog: wrong, in the crowd, right; cow: wrong, right; cat: right.
    assert judged(dataset, table, "") == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert official["AP50"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=0.01)
    ours = evaluate_openimages(dataset, "val", table, say=lambda *_: None)[MEAN_AP.format(0.5)]
    assert ours < judged(build(tmp_path / "other"), table, "openimages")


def test_not_exhaustive_classes_are_forgiven(tmp_path, table):
    dataset = build(tmp_path / "set", frequency=["r", "c", "f"])
    # In "a" nobody looked for dogs, and in "c" not every cow has a box.
    assert judged(dataset, table, "lvis") == pytest.approx(1.0)
    truth = make_rule(dataset, "lvis").truth(np.array([2]))
    assert (np.diff(truth.keys) >= 0).all() and len(truth.boxes) == 3
    assert make_rule(dataset, "lvis").counts(np.array([0, 1, 2])).tolist() == [1, 1, 1]


def test_an_exhaustive_dataset_has_every_class_verified(tmp_path):
    for exhaustive in (False, True):
        dataset = build(tmp_path / json.dumps(exhaustive), exhaustive=exhaustive)
        none = np.zeros((3, 3), bool)
        truth = openimages.gather_truth(dataset, np.array([0, 1, 2]), none, True)
        assert truth.evaluated.all() == exhaustive
        assert not openimages.gather_truth(dataset, np.array([0]), none, False).evaluated.all()
