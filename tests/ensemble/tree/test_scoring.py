"""Scores of candidate trees are exactly the metric's."""

import dataclasses

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.metrics import matching, openimages
from common.tables import DetectionsWriter
from ensemble.operators import Voting
from ensemble.operators.groups import Rows, apply_operator
from ensemble.preparation import open_prepared
from ensemble.tree import binary_tree as trees
from ensemble.tree import scoring
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree
from tests.ensemble.scenes import LABELS, MODELS, SETTINGS, all_rows, evaluate, make_scene, open_all

MEAN_AP = openimages.MEAN_AP.format(0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scoring"))


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
    plain = {"image_labels": False, "group_of_weight": 0.0}
    for metric, threshold in (({}, 0.5), (plain, 0.3)):
        dataset, scorers = open_all(
            folder,
            ("tune", "report"),
            shard_rows=shard_rows,
            cache_bytes=100,
            iou_thresholds=(threshold,),
            **metric,
        )
        merged, like = merge_all(folder, root)
        for split, scorer in zip(("tune", "report"), scorers, strict=True):
            score = scorer.score(Tree(root, tuple(MODELS)))
            official = evaluate(dataset, like, merged, split, iou_threshold=threshold, **metric)
            assert score.mean == official.pop(openimages.MEAN_AP.format(threshold))
            aps = [score.aps[i] for i in np.flatnonzero(np.isfinite(score.aps))]
            assert aps == list(official.values())


def merge_all(folder, root):
    """What `tree.apply` makes of the tables, and one of these."""
    given, like = all_rows(folder)
    used = trees.leaves(root)
    by_model = {m: rows for m, rows in zip(MODELS, given, strict=True) if m in used}
    return trees.apply(Tree(root, tuple(sorted(used))), by_model), like


@pytest.mark.parametrize("root", ROOTS[1:3])
def test_several_thresholds_have_the_mean_of_their_scores(folder, root):
    thresholds = (0.3, 0.5, 0.9)
    dataset, (scorer,) = open_all(folder, iou_thresholds=thresholds)
    merged, like = merge_all(folder, root)
    official = [
        evaluate(dataset, like, merged, "tune", iou_threshold=t)[openimages.MEAN_AP.format(t)]
        for t in thresholds
    ]
    score = scorer.score(Tree(root, tuple(MODELS)))
    assert score.mean == pytest.approx(np.mean(official), abs=1e-12) and len(set(official)) > 1


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


def test_folds_are_scored_as_images_of_their_own(folder):
    dataset, (scorer,) = open_all(folder, folds=3)
    tree = Tree(ROOTS[1], ("one", "two", "three"))
    given, like = all_rows(folder)
    merged = trees.apply(tree, given)
    tuned = [i for i in dataset.find_images(like.image_ids) if i in set(dataset.split("tune"))]
    assert scorer.score(tree).mean == evaluate(dataset, like, merged, "tune")[MEAN_AP]
    for part, value in zip(np.array_split(tuned, 3), scorer.score_folds(tree), strict=True):
        # The evaluator on a table that covers this fold only.
        ids = {dataset.image_id(i) for i in part}
        codes = np.array([i for i, name in enumerate(like.image_ids) if name in ids])
        inside = np.isin(merged.group // len(LABELS), codes)
        own = merged.take(inside)
        place = np.searchsorted(codes, own.group // len(LABELS))
        own = dataclasses.replace(own, group=place * len(LABELS) + own.group % len(LABELS))
        covered = dataclasses.replace(like, image_ids=[like.image_ids[c] for c in codes])
        figures = evaluate(dataset, covered, own, "tune", allow_partial=True)
        assert value == figures[MEAN_AP]
