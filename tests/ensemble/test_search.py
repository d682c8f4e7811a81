"""The ensemble search: its scores are the metric's, it finds what is there, it survives a kill."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.io.settings import read_settings
from common.metrics import matching, openimages
from common.tables import Detections, DetectionsWriter, read_detections
from configs.ensemble import auto
from ensemble import draw_tree, search
from ensemble.merge import merge_tables
from ensemble.operators import Voting
from ensemble.operators.groups import Rows, apply_operator
from ensemble.preparation import open_prepared
from ensemble.settings import EnsembleSettings
from ensemble.tree import binary_tree as trees
from ensemble.tree import evolution, scoring
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree
from tests.remote import use_fake_store

LABELS = ["/m/a", "/m/b", "/m/c", "/m/d"]
HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/b"}]},
        {"LabelName": "/m/c"},
        {"LabelName": "/m/d"},
    ],
}
MODELS = ["one", "two", "three"]
SETTINGS = read_settings(EnsembleSettings, auto.get_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with two splits and three tables: one finds half of it, two places boxes badly."""
    folder = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    found: dict[str, dict] = {model: {} for model in MODELS}
    with DatasetWriter(folder / "set", "test", LABELS, LABELS, HIERARCHY, "") as writer:
        rows = []
        for number in range(60):
            image_id = f"i{number * 37 % 60:02d}"
            count = rng.integers(0, 4)
            corner = rng.integers(0, 5, (count, 2)) / 8
            boxes = np.concatenate([corner, corner + rng.integers(2, 4, (count, 2)) / 8], axis=1)
            classes = rng.integers(0, len(LABELS), count)
            flags = np.where(rng.random(count) < 0.2, GROUP_OF, 0)
            verified = rng.permutation(len(LABELS))[:2]
            rows.append(
                writer.add_image(
                    image_id, "x.jpg", (8, 8), boxes, classes, flags, verified, verified % 2
                )
            )
            for place, model in enumerate(MODELS):
                found[model][image_id] = detect(rng, place, boxes, classes)
        writer.add_split("tune", rows[:40])
        writer.add_split("report", rows[40:])
        writer.add_split("mixed", rows[30:])
    for model, images in found.items():
        with DetectionsWriter(folder / f"{model}.parquet", {"model": model}) as writer:
            for image_id, detections in images.items():
                writer.add(image_id, *detections)
    return folder


def detect(rng, place, boxes, classes):
    chosen = rng.random(len(boxes)) < (0.5, 0.9, 0.7)[place]
    near = boxes[chosen] + rng.normal(0, (0.01, 0.05, 0.02)[place], (chosen.sum(), 4))
    near = np.concatenate([near, near[: len(near) // 2] + 0.01])
    labels = np.concatenate([classes[chosen], classes[chosen][: len(near) - chosen.sum()]])
    corner = rng.random((3, 2)) * 0.6
    boxes = np.concatenate([near, np.concatenate([corner, corner + 0.3], axis=1)]).clip(0, 1)
    boxes[-1, 2] = boxes[-1, 0]  # without area
    labels = np.concatenate([labels, rng.integers(0, len(LABELS), 3)])
    # Few scores, so that ties are common.
    scores = np.concatenate([rng.integers(3, 9, len(near)) / 10, rng.integers(1, 6, 3) / 10])
    return [LABELS[label] for label in labels], scores.astype(np.float32), boxes


def paths(folder):
    return [str(folder / f"{model}.parquet") for model in MODELS]


def open_all(folder, splits=("tune",), **options):
    dataset = Dataset.open(folder / "set")
    tables, preparation = open_prepared(paths(folder), SETTINGS, dataset)
    options = {"say": lambda text: None, **options}
    return dataset, scoring.build_scorers(dataset, splits, tables, preparation, **options)


def all_rows(folder):
    """Rows of each table with group = image * K + class, and the table itself."""
    found = [read_detections(path, LABELS) for path in paths(folder)]
    rows = [
        Rows(
            d.image_index.astype(np.int64) * len(LABELS) + d.label_index,
            d.scores,
            d.boxes,
            np.zeros(len(d), np.int32),
        )
        for d in found
    ]
    return rows, found[0]


def evaluate(dataset, like: Detections, rows: Rows, split: str, **options):
    """Metric of merged rows by the evaluator."""
    image, label = rows.group // len(LABELS), rows.group % len(LABELS)
    order = np.lexsort((np.arange(len(rows)), -rows.scores, image))
    merged = dataclasses.replace(
        like,
        image_index=image[order].astype(np.int32),
        label_index=label[order].astype(np.int32),
        scores=rows.scores[order],
        boxes=rows.boxes[order],
    )
    return openimages.evaluate_openimages(dataset, split, merged, say=lambda text: None, **options)


ROOTS = [
    Leaf("two"),
    Node(Leaf("one"), Leaf("two"), Operators((1.0, 0.5), vote=0.5, box=0.3, nms="adj")),
    Node(
        Node(Leaf("one"), Leaf("three"), Operators(box=0.5)),
        Leaf("two"),
        Operators((0.5, 1.0), ("both", "boxes"), vote=0.1, box=0.2, nms="soft"),
    ),
    Node(
        Leaf("three"),
        Node(Leaf("two"), Leaf("one"), Operators(nms="soft")),
        Operators(elements=("scores", "both"), vote=1.0),
    ),
]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("shard_rows", [1 << 19, 60])
def test_scores_are_exactly_those_of_the_evaluator(folder, root, shard_rows):
    """For the rows that `tree.apply` makes: mAP and every AP, on both splits."""
    for metric in ({}, {"image_labels": False, "iou_threshold": 0.3, "group_of_weight": 0.0}):
        dataset, scorers = open_all(
            folder, ("tune", "report"), shard_rows=shard_rows, cache_bytes=100, **metric
        )
        tree = Tree(root, tuple(MODELS))
        given, like = all_rows(folder)
        merged = trees.apply(
            dataclasses.replace(tree, models=tuple(sorted(trees.leaves(root)))),
            {
                model: rows
                for model, rows in zip(MODELS, given, strict=True)
                if model in trees.leaves(root)
            },
        )
        for split, scorer in zip(("tune", "report"), scorers, strict=True):
            score = scorer.score(tree)
            official = evaluate(dataset, like, merged, split, **metric)
            threshold = metric.get("iou_threshold", 0.5)
            assert score.mean == official.pop(openimages.MEAN_AP.format(threshold))
            aps = [score.aps[i] for i in np.flatnonzero(np.isfinite(score.aps))]
            assert aps == list(official.values())


def test_the_cap_of_detections_of_one_class_in_an_image_holds(folder, monkeypatch):
    monkeypatch.setattr(matching, "MAX_PER_CLASS", 2)
    dataset, (scorer,) = open_all(folder)
    given, like = all_rows(folder)
    root = Node(Leaf("one"), Leaf("two"), Operators(nms="soft"))
    merged = trees.apply(Tree(root, ("one", "two")), given[:2])
    official = evaluate(dataset, like, merged, "tune")
    assert scorer.score(Tree(root, ("one", "two"))).mean == official[openimages.MEAN_AP.format(0.5)]


def test_flat_operators_score_exactly_too(folder):
    dataset, (scorer,) = open_all(folder)
    given, like = all_rows(folder)
    names = ("group", "scores", "boxes", "model")
    flat, _ = apply_operator(
        Rows(*(np.concatenate([getattr(rows, n) for rows in given]) for n in names)), Voting()
    )
    flat = flat.take(np.lexsort((-flat.scores, flat.group)))
    official = evaluate(dataset, like, flat, "tune")
    score = scorer.score_operator(lambda rows: apply_operator(rows, Voting()))
    assert score.mean == official[openimages.MEAN_AP.format(0.5)]


def test_unchanged_subtrees_are_not_joined_again(folder):
    _, (scorer,) = open_all(folder)
    inner = Node(Leaf("one"), Leaf("two"), Operators(nms="adj"))
    scorer.score(Tree(Node(inner, Leaf("three"), Operators()), tuple(MODELS)))
    assert scorer.num_joins == 2
    scorer.score(Tree(Node(inner, Leaf("three"), Operators(vote=1.0)), tuple(MODELS)))
    assert scorer.num_joins == 3
    # Other thresholds are another subtree.
    scorer.score(Tree(Node(inner, Leaf("three"), Operators()), tuple(MODELS), sigma=0.1))
    assert scorer.num_joins == 5


def test_refuses_splits_that_do_not_fit(folder, tmp_path):
    with pytest.raises(UserError, match="split 'mixed' shares 10 images .*over-fitting"):
        open_all(folder, ("tune", "mixed"))
    for model in ("one", "two"):
        with DetectionsWriter(tmp_path / f"{model}.parquet", {}) as writer:
            writer.add("i00", ["/m/a"], np.ones(1), np.array([[0, 0, 1, 1]]))
    dataset = Dataset.open(folder / "set")
    tables, preparation = open_prepared(
        [str(tmp_path / f"{model}.parquet") for model in ("one", "two")], SETTINGS, dataset
    )
    with pytest.raises(UserError, match="cover 1 of the 40 images of split 'tune', 'i.*' is miss"):
        scoring.build_scorers(dataset, ["tune"], tables, preparation)


def small_config(arg=None, **trees_of_stages):
    config = auto.get_config(arg)
    config.search.trees = trees_of_stages or dict(topology=4, operators=12, joint=0)
    config.search.population = 4
    # Adj-NMS alone: fewer kernels to compile.
    config.search.space.nms = ("nms", "adj")
    return config


def run(folder, output, config, lines=None, report="report"):
    return search.search_tables(
        paths(folder),
        config,
        Dataset.open(folder / "set"),
        "tune",
        report,
        output,
        say=(lines if lines is not None else []).append,
    )


def test_search_beats_its_start_and_reports_both_splits(folder, tmp_path):
    lines = []
    config = small_config()
    config.search.log_seconds = 0
    best = run(folder, tmp_path / "tree.json", config, lines)
    assert trees.load(tmp_path / "tree.json") == best
    assert sorted(trees.leaves(best.root)) == sorted(MODELS)
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
    assert notes["nodes"][""] == final and len(notes["nodes"]) == 5
    progress = [line for line in lines if line.startswith("search ")]
    assert len(progress) == 16 and "best tune 0." in progress[-1] and "report 0." in progress[-1]
    table = next(line for line in lines if line.startswith("mAP"))
    assert [row.split("  ")[0].strip() for row in table.splitlines()[-3:]] == [
        "naive ensemble",
        "tree after stage topology",
        "tree",
    ]
    picture = (tmp_path / "tree.svg").read_text()
    assert all(model in picture for model in MODELS) and f"{100 * final[0]:.2f}" in picture


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
    return tables, {"expansion": option, "min_score": 0.2, "dataset": str(folder / "set")}


@pytest.mark.parametrize(
    "option", ["weights", "experts", "mappings", "coverage", "before", "after"]
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
    (tmp_path / "tree.search.json").write_text("{")
    with pytest.raises(UserError, match="no readable state .*remove it"):
        run(folder, tmp_path / "tree.json", config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trees": dict(topology=0, operators=0, joint=0)}, "search.trees: found 'all zero'"),
        ({"space": {"nms": ("nms", "wbf")}}, "space.nms: found 'wbf', expected one of nms, soft"),
        ({"space": {"weights": (1.5,)}}, "space.weights: found 1.5, expected 0.001 to 1"),
        ({"equal": {"box": -1.0}}, "space.boxes: found -1.0"),
        ({"population": 0}, "config.search.population: found 0, expected 1 or more"),
    ],
)
def test_refuses_settings_that_make_no_sense(change, message):
    config = auto.get_config()
    config.search.update(change)
    with pytest.raises(UserError, match=message):
        read_settings(EnsembleSettings, config)


def test_changes_keep_every_model_once_and_mirrored_trees_are_one():
    rng = np.random.default_rng(0)
    models = [f"m{i}" for i in range(6)]
    order = {model: place for place, model in enumerate(models)}
    options = read_settings(EnsembleSettings, auto.get_config()).search
    space, equal = options.space, options.equal
    root = evolution.starting_trees(dict.fromkeys(models, 0.5), equal)[0]
    seen = set()
    for step in range(300):
        change = (evolution.change_topology, evolution.change_operators)[step % 2]
        root = evolution.canonical(change(rng, root, space, equal), order)
        assert sorted(trees.leaves(root)) == models
        text = json.dumps(trees.node_to_json(root))
        assert trees.node_from_json(json.loads(text), "x") == root
        seen.add(text)
    assert len(seen) > 250
    mirrored = Node(
        root.right,
        root.left,
        dataclasses.replace(
            root.operators,
            weights=root.operators.weights[::-1],
            elements=root.operators.elements[::-1],
        ),
    )
    assert evolution.canonical(mirrored, order) == root


def test_starting_trees_are_ladders_and_a_balanced_tree():
    scores = {"a": 0.2, "b": 0.5, "c": 0.4, "d": 0.1, "e": 0.3}
    best, worst, balanced = evolution.starting_trees(scores, Operators())
    assert trees.leaves(best) == list("bcead") and best.left == Leaf("b")
    assert worst.left == Leaf("d")
    assert draw_tree._height(best) == 4 and draw_tree._height(balanced) == 3
    assert sorted(trees.leaves(balanced)) == list("abcde")
    assert evolution.starting_trees({"a": 0.1}, Operators()) == [Leaf("a")]


def test_names_are_escaped_in_the_picture():
    root = Node(Leaf("<a>&"), Leaf("b"), Operators(elements=("both", "scores")))
    picture = draw_tree.draw(Tree(root, ("<a>&", "b")), {})
    assert "&lt;a&gt;&amp;" in picture and "scores" in picture
