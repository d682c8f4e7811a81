"""From tables to a calibration to a merged table; the identity changes nothing."""

import json

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics.openimages import MEAN_AP, evaluate_openimages
from common.tables import read_detections
from configs.ensemble import calibrated, naive, voting
from ensemble.calibrate import calibrate_tables
from ensemble.calibration import calibration as calibrations
from ensemble.calibration import curves, recipes
from ensemble.calibration.calibration import Calibration, Recipe
from ensemble.calibration.curves import ClassCurves, Curve
from ensemble.calibration.oracle import best_ranking
from ensemble.merge import merge_tables
from tests.ensemble.scenes import LABELS, MODELS, make_scene, paths
from tests.pages import Page

QUIET = dict(say=lambda *_, **__: None)
WHOLE = Recipe(tuple(MODELS), 0, False, {"name": "nms", "iou_threshold": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def calibrated_scene(folder, tmp_path_factory):
    """Path of a calibration of the three tables, and what was printed."""
    output = tmp_path_factory.mktemp("calibration") / "cal.json"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "OPERATORS", recipes.OPERATORS[:1] + recipes.OPERATORS[5:6])
        calibrate_tables(
            paths(folder),
            calibrated.get_config(),
            Dataset.open(folder / "set"),
            "tune",
            output,
            say=lines.append,
        )
    return output, "\n".join(lines)


def make_calibration(fitted, opinion=None, recipe=WHOLE):
    ranks = np.zeros((len(MODELS), len(LABELS)))
    return Calibration(tuple(MODELS), tuple(LABELS), fitted, ranks, opinion, recipe)


def write(path, fitted, **options):
    calibrations.save(path, make_calibration(fitted, **options), "openimages", {})
    return str(path)


def merged(folder, config, output):
    merge_tables(paths(folder), config, output, **QUIET)
    found = read_detections(output)
    return [getattr(found, name) for name in ("image_index", "label_index", "scores", "boxes")]


@pytest.mark.parametrize("module", [naive, voting])
def test_an_identity_calibration_merges_bit_for_bit_as_none(folder, tmp_path, module):
    none = [ClassCurves(curves.IDENTITY, np.zeros(len(LABELS)))] * 3
    config = module.get_config()
    plain = merged(folder, config, tmp_path / "plain.parquet")
    config.calibration = write(tmp_path / "cal.json", none)
    same = merged(folder, config, tmp_path / "same.parquet")
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_array_equal(a, b)
    # A recipe that is the same operator on all tables gives the same, too.
    if module is naive:
        config.operator = {"name": "recipe"}
        for a, b in zip(plain, merged(folder, config, tmp_path / "r.parquet"), strict=True):
            np.testing.assert_array_equal(a, b)


def test_calibrating_one_table_lowers_no_ap(folder, tmp_path):
    """Curves and shifts of classes rise, so the ranking within a class stays."""
    dataset = Dataset.open(folder / "set")
    curve = Curve("isotonic", np.array([0.2, 0.45, 0.8]), np.array([0.01, 0.3, 0.35]))
    fitted = [ClassCurves(curve, np.array([1.0, -2.0, 0.0, 0.5]))] * 3
    config = naive.get_config()
    config.operator = {"name": "nms", "iou_threshold": 1.0}
    config.calibration = write(tmp_path / "cal.json", fitted)
    merge_tables([paths(folder)[1]], config, tmp_path / "m.parquet", **QUIET)
    figures = [
        evaluate_openimages(dataset, "report", table, say=lambda _: None)
        for table in (paths(folder)[1], tmp_path / "m.parquet")
    ]
    assert figures[0] == figures[1]


def test_a_calibrated_ensemble_is_no_worse_than_the_best_table(folder, calibrated_scene, tmp_path):
    output, printed = calibrated_scene
    dataset = Dataset.open(folder / "set")
    assert "best table alone" in printed and "ECE before" in printed
    content = json.loads(output.read_text())
    best, single = content["notes"]["best"], content["notes"]["single"]
    assert best[0] >= single[0] and best[1] >= single[1]
    tables = content["notes"]["tables"].values()
    assert all(table["error_after"] < table["error_before"] for table in tables)
    config = calibrated.get_config()
    config.calibration = str(output)
    config.max_detections = 0
    merge_tables(paths(folder), config, tmp_path / "m.parquet", **QUIET)
    name = MEAN_AP.format(0.5)
    reached = evaluate_openimages(dataset, "tune", tmp_path / "m.parquet", say=lambda _: None)
    alone = [
        evaluate_openimages(dataset, "tune", path, say=lambda _: None)[name]
        for path in paths(folder)
    ]
    assert reached[name] >= max(alone)
    page = output.with_suffix(".html").read_text()
    assert len(Page(page).addresses) == 1 + 3 + 3  # to the content, the sections; pictures
    assert "taken" in page and page.count('<img alt="Reliability of') == 3


def test_a_file_reads_back_as_it_was_written(calibrated_scene, tmp_path):
    output, _ = calibrated_scene
    found = calibrations.load(output)
    calibrations.save(tmp_path / "again.json", found, "openimages", {})
    again = calibrations.load(tmp_path / "again.json")
    for a, b in zip(found.curves, again.curves, strict=True):
        np.testing.assert_array_equal(a.curve.scores, b.curve.scores)
        np.testing.assert_array_equal(a.curve.precisions, b.curve.precisions)
        np.testing.assert_array_equal(a.shifts, b.shifts)
    assert found.recipe == again.recipe and found.names == tuple(MODELS)


def test_a_perfect_ranking_is_a_ceiling(folder):
    dataset = Dataset.open(folder / "set")
    table = paths(folder)[1]
    plain = evaluate_openimages(dataset, "tune", table, say=lambda _: None)
    ceiling = best_ranking(table, dataset, "tune", "openimages")
    assert plain[MEAN_AP.format(0.5)] < ceiling <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tree"}, "no calibration, expected a JSON object"),
        ({"format": 2}, "field format is 2"),
        ({"models": {}}, "recipe: ValueError models one, two, three"),
        ({"opinion": [[1.0]]}, "opinion: ValueError weights of shape"),
        ({"recipe": {"models": ["x"]}}, "recipe: ValueError models x, expected some of one"),
    ],
)
def test_broken_files_are_named(tmp_path, change, message):
    none = [ClassCurves(curves.IDENTITY, np.zeros(len(LABELS)))] * 3
    path = tmp_path / "cal.json"
    write(path, none)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f"cal.json: {message}"):
        calibrations.load(path)
    falling = Curve("beta", np.array([0.5, 0.4]), np.array([0.1, 0.2]))
    write(path, [ClassCurves(falling, np.zeros(len(LABELS)))] * 3)
    with pytest.raises(UserError, match="models.one: ValueError scores do not rise"):
        calibrations.load(path)


def test_tables_that_it_does_not_know_are_refused(folder, tmp_path):
    none = [ClassCurves(curves.IDENTITY, np.zeros(len(LABELS)))] * 3
    config = calibrated.get_config()
    with pytest.raises(UserError, match="'recipe' needs --config.calibration=FILE"):
        merge_tables(paths(folder), config, tmp_path / "m.parquet", **QUIET)
    config.calibration = write(tmp_path / "cal.json", none)
    with pytest.raises(UserError, match="--inputs lacks 'three'"):
        merge_tables(paths(folder)[:2], config, tmp_path / "m.parquet", **QUIET)
    named = [f"x={paths(folder)[0]}", *paths(folder)[1:]]
    config.operator = {"name": "nms"}
    with pytest.raises(UserError, match="calibrates one, two, three, not 'x'"):
        merge_tables(named, config, tmp_path / "m.parquet", **QUIET)


def test_the_best_models_of_a_class():
    ranks = np.array([[0.5, 0.1], [0.4, 0.2], [0.6, 0.0]])
    member = np.array([True, True, False])
    assert calibrations.best_models(ranks, member, 0).tolist() == [[True] * 2] * 2 + [[False] * 2]
    one = calibrations.best_models(ranks, member, 1)
    assert one.tolist() == [[True, False], [False, True], [False, False]]


def test_the_search_of_recipes_contains_each_table_alone():
    """Where merging only hurts, the best table alone is taken; so it is where folds disagree."""

    def score(recipe):
        return {"one": 0.3, "two": 0.5, "three": 0.2}[recipe.models[0]] if alone(recipe) else 0.1

    def alone(recipe):
        return len(recipe.models) == 1 and not recipe.opinion

    choice = recipes.choose(MODELS, score, lambda r, f: score(r), 3, lambda _: None)
    assert choice.best.recipe == choice.single.recipe
    assert choice.best.recipe == Recipe(("two",), 0, False, recipes.ALONE)

    def tempting(recipe):
        return score(recipe) if alone(recipe) else 0.9

    choice = recipes.choose(MODELS, tempting, lambda r, f: score(r), 3, lambda _: None)
    assert choice.best.recipe == Recipe(("two",), 0, False, recipes.ALONE)
    choice = recipes.choose(MODELS, tempting, lambda r, f: tempting(r), 3, lambda _: None)
    assert choice.best.score == 0.9 and len(choice.best.recipe.models) >= 1


def test_binned_ap_is_the_area_below_the_curve():
    hits = np.array([[0.0, 1.0, 1.0, 2.0]])
    rows = np.array([[5.0, 2.0, 1.0, 2.0]])
    # Best bin first: 2 of 2, 3 of 3, 4 of 5.
    found = recipes.binned_ap(rows, hits, np.array([5.0]))
    np.testing.assert_allclose(found, (2 * 1 + 1 * 1 + 1 * 0.8) / 5)
