"""The ensemble search: it finds what is there, it survives a kill, merging repeats its scores."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics import openimages
from common.tables import DetectionsWriter, read_detections
from ensemble import search
from ensemble.calibration import calibration as calibrations
from ensemble.calibration.calibration import Calibration, Recipe
from ensemble.calibration.curves import ClassCurves, Curve
from ensemble.calibration.opinion import Opinion, num_features
from ensemble.merge import merge_tables
from ensemble.tree import binary_tree as trees
from ensemble.tree import scoring
from tests.ensemble.scenes import (
    LABELS,
    MODELS,
    all_rows,
    evaluate,
    make_scene,
    paths,
    run,
    small_config,
)
from tests.remote import use_fake_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("search"))


def test_search_beats_its_start_and_reports_both_splits(folder, tmp_path):
    lines = []
    config = small_config()
    config.search.log_seconds = 0
    best = run(folder, tmp_path / "tree.json", config, lines)
    assert trees.load(tmp_path / "tree.json") == best
    assert set(trees.leaves(best.root)) <= set(MODELS)
    notes = trees.read_notes(tmp_path / "tree.json")
    scores = notes["scores"]
    first, final = scores["tree after stage topology"], scores["tree"]
    assert final[0] > first[0] and final[0] > max(scores[f"single {m}"][0] for m in MODELS)
    # The notes hold what the evaluator says of the merged tables.
    dataset = Dataset.open(folder / "set")
    given, like = all_rows(folder)
    merged = trees.apply(best, given)
    for split, value in zip(("tune", "report"), final, strict=True):
        official = evaluate(dataset, like, merged, split)
        assert value == official[openimages.MEAN_AP.format(0.5)]
    # So do those that the command writes.
    config.tree = str(tmp_path / "tree.json")
    config.dataset = str(folder / "set")
    merge_tables(paths(folder), config, tmp_path / "merged.parquet", say=lambda *_, **__: None)
    official = openimages.evaluate_openimages(dataset, "tune", tmp_path / "merged.parquet")
    assert official[openimages.MEAN_AP.format(0.5)] == final[0]
    assert notes["nodes"][""] == final
    assert len(notes["nodes"]) == 2 * len(trees.leaves(best.root)) - 1
    progress = [line for line in lines if line.startswith("search ")]
    assert len(progress) == 16 and "best tune 0." in progress[-1] and "report 0." in progress[-1]
    table = next(line for line in lines if line.startswith("mAP"))
    assert [row.split("  ")[0].strip() for row in table.splitlines()[-3:]] == [
        "naive ensemble",
        "tree after stage topology",
        "tree",
    ]
    picture = (tmp_path / "tree.svg").read_text()
    assert (
        all(model in picture for model in trees.leaves(best.root))
        and f"{100 * final[0]:.2f}" in picture
    )


def prepared_inputs(folder, tmp_path, option):
    """Inputs and config fields that prepare the rows before the tree."""
    tables = paths(folder)
    if option == "weights":
        name = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/{}"
        (tmp_path / "two.json").write_text(json.dumps({name.format("/m/a"): 0.9}))
        (tmp_path / "one.json").write_text(json.dumps({name.format("/m/a"): 0.2}))
        metrics = f"one={tmp_path / 'one.json'},two={tmp_path / 'two.json'}"
        return tables, {"weights.metrics": metrics, "weights.models": "three=0.4"}
    if option == "experts":
        (tmp_path / "expert.csv").write_text("/m/b\n/m/d\n")
        return tables, {"experts": f"two={tmp_path / 'expert.csv'}"}
    if option == "mappings":  # /m/a there is /m/a and /m/c here, /m/d is nothing
        (tmp_path / "map.csv").write_text("there,here\nx,/m/a\nx,/m/c\ny,/m/b\nz,/m/c\n")
        names = {"/m/a": "x", "/m/b": "y", "/m/c": "z", "/m/d": "w"}
        found = read_detections(tables[2], LABELS)
        with DetectionsWriter(tmp_path / "three.parquet", {}) as writer:
            for image, image_id in enumerate(found.image_ids):
                rows = found.image_index == image
                labels = [names[LABELS[c]] for c in found.label_index[rows]]
                writer.add(image_id, labels, found.scores[rows], found.boxes[rows])
        mapping = f"three={tmp_path / 'map.csv'}:there:here:all"
        return [*tables[:2], str(tmp_path / "three.parquet")], {"mappings": mapping}
    if option == "coverage":
        found = read_detections(tables[2], LABELS)
        with DetectionsWriter(tmp_path / "three.parquet", {}) as writer:
            for image in range(0, len(found.image_ids), 2):
                rows = found.image_index == image
                labels = [LABELS[c] for c in found.label_index[rows]]
                writer.add(found.image_ids[image], labels, found.scores[rows], found.boxes[rows])
        return [*tables[:2], str(tmp_path / "three.parquet")], {"coverage": "union"}
    if option == "calibration":
        return tables, {"calibration": str(write_calibration(tmp_path / "cal.json"))}
    return tables, {"expansion": option, "min_score": 0.2, "dataset": str(folder / "set")}


def write_calibration(path):
    """Curves, shifts of classes and a second opinion, all drawn."""
    rng = np.random.default_rng(0)
    curves = [
        ClassCurves(
            Curve("isotonic", np.array([0.1, 0.4, 0.9]), np.sort(rng.random(3))),
            rng.normal(0, 0.5, len(LABELS)),
        )
        for _ in MODELS
    ]
    opinion = Opinion(rng.normal(0, 0.2, (len(MODELS), num_features(len(MODELS)))))
    recipe = Recipe(tuple(MODELS), 0, True, {"name": "nms"})
    ranks = np.zeros((len(MODELS), len(LABELS)))
    calibration = Calibration(tuple(MODELS), tuple(LABELS), curves, ranks, opinion, recipe)
    calibrations.save(path, calibration, "openimages", {})
    return path


@pytest.mark.parametrize(
    "option", ["weights", "experts", "mappings", "coverage", "before", "after", "calibration"]
)
def test_the_merged_tables_score_what_the_search_reported(folder, tmp_path, monkeypatch, option):
    """Rows are prepared alike: a tree is tuned on the scores that it is used on."""
    monkeypatch.setattr(scoring, "SHARD_ROWS", 60)
    tables, fields = prepared_inputs(folder, tmp_path, option)
    config = small_config(topology=2, operators=4, joint=0)
    config.update_from_flattened_dict(fields)
    dataset = Dataset.open(folder / "set")
    quiet = dict(say=lambda *_, **__: None)
    search.search_tables(tables, config, dataset, "tune", "report", tmp_path / "tree.json", **quiet)
    config.tree = str(tmp_path / "tree.json")
    merge_tables(tables, config, tmp_path / "merged.parquet", **quiet)
    reported = trees.read_notes(tmp_path / "tree.json")["scores"]["tree"]
    for split, value in zip(("tune", "report"), reported, strict=True):
        official = openimages.evaluate_openimages(
            dataset, split, tmp_path / "merged.parquet", say=lambda text: None
        )
        assert value == official[openimages.MEAN_AP.format(0.5)]
    # The preparation matters: unprepared rows of the same tree score otherwise.
    if option not in ("mappings", "coverage"):
        plain = small_config()
        plain.tree = config.tree
        merge_tables(tables, plain, tmp_path / "plain.parquet", **quiet)
        plain = openimages.evaluate_openimages(dataset, "tune", tmp_path / "plain.parquet")
        assert reported[0] != plain[openimages.MEAN_AP.format(0.5)]
    config.weights.models = "one=0.5"
    with pytest.raises(UserError, match="belongs to a search with other preparation"):
        search.search_tables(
            tables, config, dataset, "tune", "report", tmp_path / "tree.json", **quiet
        )


def test_search_and_merge_work_on_gs_addresses(folder, tmp_path, monkeypatch):
    use_fake_store(monkeypatch, tmp_path / "store")
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    for model in MODELS:
        shutil.copy(folder / f"{model}.parquet", tmp_path / "store" / "bucket")
    tables = [f"gs://bucket/{model}.parquet" for model in MODELS]
    config = small_config(topology=2, operators=0, joint=0)
    (tmp_path / "store" / "bucket" / "expert.csv").write_text("/m/a\n/m/c\n")
    config.experts = "one=gs://bucket/expert.csv"
    quiet = dict(say=lambda *_, **__: None)
    dataset, output = Dataset.open(folder / "set"), epath.Path("gs://bucket/out/tree.json")
    search.search_tables(tables, config, dataset, "tune", None, output, **quiet)
    config.tree = "gs://bucket/out/tree.json"
    merge_tables(tables, config, "gs://bucket/out/merged.parquet", **quiet)
    config.experts = f"one={tmp_path / 'store' / 'bucket' / 'expert.csv'}"
    config.tree = str(tmp_path / "store" / "bucket" / "out" / "tree.json")
    merge_tables(paths(folder), config, tmp_path / "merged.parquet", **quiet)
    found, expected = map(
        read_detections, ("gs://bucket/out/merged.parquet", tmp_path / "merged.parquet")
    )
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    names = sorted(path.name for path in (tmp_path / "store" / "bucket" / "out").iterdir())
    assert names == ["merged.parquet", "tree.json", "tree.search.json", "tree.svg"]


@pytest.mark.parametrize(
    ("field", "value"), [("relations.file", "x.npz"), ("max_detections", 300), ("masks", True)]
)
def test_what_merging_does_after_the_tree_is_refused(folder, tmp_path, field, value):
    config = small_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field}: found {value!r}, expected "):
        run(folder, tmp_path / "tree.json", config)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("joint", [False, True])
def test_a_killed_search_ends_with_the_same_tree(folder, tmp_path, monkeypatch, joint):
    stages = dict(topology=0, operators=0, joint=14) if joint else {}
    config = small_config("joint" if joint else None, **stages)
    whole = run(folder, tmp_path / "whole.json", config)
    config.search.save_seconds = 0.0
    score = scoring.Scorer.score
    calls, deadly = [], {12, 30}

    def dies(self, tree):
        calls.append(tree)
        if len(calls) in deadly:
            raise _Killed
        return score(self, tree)

    monkeypatch.setattr(scoring.Scorer, "score", dies)
    for _ in range(2):
        with pytest.raises(_Killed):
            run(folder, tmp_path / "tree.json", config)
        assert not (tmp_path / "tree.json").exists()
        assert (tmp_path / "tree.search.json").exists()
    lines = []
    assert run(folder, tmp_path / "tree.json", config, lines) == whole
    assert any("going on after" in line for line in lines)
    ours, theirs = ((tmp_path / f"{n}.json").read_text() for n in ("tree", "whole"))
    assert ours == theirs
    assert not list(tmp_path.glob("*.tmp-*"))
    # Once more: nothing is left to search, the files are written again.
    calls.clear()
    deadly.clear()
    (tmp_path / "tree.json").unlink()
    assert run(folder, tmp_path / "tree.json", config) == whole
    assert len(calls) < 25


def test_a_state_of_another_search_is_refused(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "copy")
    config = small_config(topology=3, operators=0, joint=0)
    run(folder, tmp_path / "tree.json", config, report=None)
    config.search.seed = 1
    with pytest.raises(UserError, match="belongs to a search with other settings"):
        run(folder, tmp_path / "tree.json", config)
    config.search.seed = 0
    table = folder / "two.parquet"
    rows = read_detections(table)
    with DetectionsWriter(table, {}) as writer:  # of the same name and number of rows
        for place, image_id in enumerate(rows.image_ids):
            own = rows.image_index == place
            labels = [rows.labels[i] for i in rows.label_index[own]]
            writer.add(image_id, labels, rows.scores[own] / 2, rows.boxes[own])
    with pytest.raises(UserError, match="belongs to a search with other inputs"):
        run(folder, tmp_path / "tree.json", config, report=None)
    for text, message in (("{", "no valid JSON"), ("[]", "no readable state")):
        (tmp_path / "tree.search.json").write_text(text)
        with pytest.raises(UserError, match=f"{message} .*remove it"):
            run(folder, tmp_path / "tree.json", config)


def test_a_tree_that_folds_do_not_confirm_is_not_taken():
    models = ("a", "b")
    single = trees.Tree(trees.Leaf("a"), models)
    first, second = (
        trees.Tree(trees.Node(trees.Leaf(x), trees.Leaf(y)), models) for x, y in ("ab", "ba")
    )
    scores = {single: [0.4, 0.2], first: [0.9, -0.4], second: [0.3, 0.35]}

    class Scorer:
        def score_folds(self, tree):
            return np.array(scores[tree])

    lines = []
    assert search.guarded(Scorer(), [first, second], single, lines.append) == second
    assert search.guarded(Scorer(), [first], single, lines.append) == single
    assert "tree 0.2500, best table alone 0.3000" in lines[0]
