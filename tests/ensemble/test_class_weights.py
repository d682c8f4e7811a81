"""Weights of models and classes, and which classes an expert contributes."""

import json

import numpy as np
import pytest
from PIL import Image

from common.convert.folders import read_folders
from common.convert.report import Report
from common.io.errors import UserError
from common.io.settings import read_settings
from configs.ensemble import naive
from ensemble.class_weights import class_weights, kept_classes, read_class_aps, relative_ap
from ensemble.settings import WeightSettings

NAMES, LABELS = ["a", "b"], ["/m/ant", "/m/bee", "/m/cow", "/m/dog"]
OPENIMAGES = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/"


def settings(**fields):
    config = naive.get_config().weights
    for name, value in fields.items():
        config[name] = value
    return read_settings(WeightSettings, config, "config.weights")


def metrics(path, values, prefix=OPENIMAGES):
    content = {"OpenImagesDetectionChallenge_Precision/mAP@0.5IOU": 0.5}
    path.write_text(json.dumps(content | {prefix + k: v for k, v in values.items()}))
    return str(path)


def test_relative_ap():
    aps = np.array([[0.4, 0.0, 0.2, np.nan], [0.8, 0.0, 0.1, 0.3]])
    np.testing.assert_allclose(relative_ap(aps), [[0.5, 1, 1, 1], [1, 1, 0.5, 1]])
    squared = relative_ap(aps, exponent=2.0, floor=0.3)
    np.testing.assert_allclose(squared, [[0.3, 1, 1, 1], [1, 1, 0.3, 1]])
    shares = relative_ap(aps, "sum")
    np.testing.assert_allclose(shares[:, 2], [2 / 3, 1 / 3])
    np.testing.assert_allclose(shares[:, 1], 1)
    np.testing.assert_allclose(relative_ap(aps, "none")[:, 0], [0.4, 0.8])


def test_weights_from_the_files_that_evaluation_writes(tmp_path):
    one = metrics(tmp_path / "a.json", {"/m/ant": 0.2, "/m/bee": 0.5, "/m/cow": None})
    two = metrics(
        tmp_path / "b.json",
        {"/m/ant": 0.4, "/m/bee": 0.25, "/m/dog": -1},
        "PerformanceByCategory/AP/",
    )
    expected = [[0.5, 1, 1, 1], [1, 0.5, 1, 1]]
    for text in (f"{one},{two}", f"b={two},a={one}"):
        np.testing.assert_allclose(class_weights(NAMES, LABELS, settings(metrics=text)), expected)
    # A model without a file keeps its scores.
    weights = class_weights(NAMES, LABELS, settings(metrics=f"b={two}"))
    np.testing.assert_allclose(weights, 1)


def test_model_weights_are_relative_to_the_largest():
    weights = class_weights(NAMES, LABELS, settings(models="b=4,a=1"))
    np.testing.assert_allclose(weights, [[0.25] * 4, [1] * 4])
    np.testing.assert_allclose(
        class_weights(NAMES, LABELS, settings(models="b=0.5"))[:, 0], [1, 0.5]
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"models": "c=1"}, "config.weights.models: no input is called 'c', expected one of a, b"),
        ({"models": "a=-1"}, "a has weight '-1', expected a number, 0 or more"),
        ({"models": "a=nan"}, "a has weight 'nan'"),
        ({"models": "a=0,b=0"}, "all weights are 0"),
        ({"models": "0.5,0.5"}, "found '0.5', expected name=value,name=value"),
        ({"models": "a=1,a=2"}, "'a' is given twice"),
        ({"metrics": "x.json"}, "1 files for 2 tables, expected one each"),
        ({"metrics": "x.json,y.json"}, r"x\.json: no readable metrics file"),
        ({"metrics": "c=x.json,a=y.json"}, "no input is called 'c'"),
    ],
)
def test_weights_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        class_weights(NAMES, LABELS, settings(**fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"normalize": "mean"}, "config.weights.normalize: found 'mean'"),
        ({"exponent": -1.0}, "config.weights.exponent: found -1.0"),
        ({"floor": 2.0}, "config.weights.floor: found 2.0"),
    ],
)
def test_values_out_of_range(tmp_path, fields, message):
    path = metrics(tmp_path / "a.json", {"/m/ant": 0.2})
    with pytest.raises(UserError, match=message):
        class_weights(["a"], LABELS, settings(metrics=path, **fields))


def test_metrics_files_without_ap_per_class(tmp_path):
    path = tmp_path / "x.json"
    for text, message in (
        ('{"AP": 0.5}', "no AP per class, expected a file of detection.evaluate"),
        ("[1]", "no AP per class"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "nested too deep"),
        (json.dumps({OPENIMAGES + "/m/ant": 61.0}), "is 61.0, expected an AP in"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"x\.json: .*{message}"):
            read_class_aps(str(path))
    other = metrics(path, {"person": 0.5})
    with pytest.raises(UserError, match="AP of 1 classes, such as 'person', none of the classes"):
        class_weights(["a"], LABELS, settings(metrics=other))


def test_a_class_list_that_data_are_prepared_with_is_an_experts(tmp_path):
    """As a spreadsheet saves it: with a byte order mark, another header, and decomposed letters."""
    path = tmp_path / "classes.csv"
    path.write_text("\ufeffLabelName,DisplayName\nCafe\u0301,A cafe\nwine  glass,A glass\n")
    photo = tmp_path / "photos" / "Cafe\u0301" / "1.jpg"
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photo)
    prepared = read_folders(photo.parents[1], Report(), classes=path)
    assert prepared.class_labels == ["Caf\u00e9", "wine glass"]
    for labels in (prepared.class_labels, ["Cafe\u0301", "wine glass"]):
        kept = kept_classes(NAMES, [*labels, "spoon"], f"a={path}")
        np.testing.assert_array_equal(kept, [[True, True, False], [True] * 3])


def test_experts_contribute_their_classes_only(tmp_path):
    path = tmp_path / "classes.csv"
    for text in ("label,name\n/m/bee,Bee\n/m/dog,Dog\n", "/m/bee\n\n/m/dog\n"):
        path.write_text(text)
        kept = kept_classes(NAMES, LABELS, f"b={path}")
        np.testing.assert_array_equal(kept, [[True] * 4, [False, True, False, True]])
    path.write_text("/m/bee\n\n/m/eel\n")
    with pytest.raises(UserError, match=r"classes\.csv: line 3: '/m/eel' is none of the 4 classes"):
        kept_classes(NAMES, LABELS, f"b={path}")
    with pytest.raises(UserError, match="config.experts: no input is called 'x'"):
        kept_classes(NAMES, LABELS, f"x={path}")
    with pytest.raises(UserError, match=r"none\.csv: cannot read the class list"):
        kept_classes(NAMES, LABELS, f"a={tmp_path / 'none.csv'}")
