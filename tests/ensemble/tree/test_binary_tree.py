"""The ensemble tree: what a node does, and its JSON file."""

import dataclasses
import json

import numpy as np
import pytest

from common.io.errors import UserError
from ensemble.operators import AdjNms, Nms, SoftNms
from ensemble.operators.groups import Rows, apply_operator
from ensemble.tree import binary_tree as trees
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree
from tests.oracles import tree_node as oracle

MODELS = ("a", "b", "c")


def draw_rows(rng, model, num_groups=25) -> Rows:
    """Up to four rows a model in groups of a few objects."""
    objects = rng.random((num_groups, 2, 2)) * 0.6
    group = np.repeat(np.arange(num_groups) * 7, rng.integers(0, 5, num_groups))
    corner = objects[group // 7, rng.integers(0, 2, len(group))]
    corner = corner + rng.normal(0, 0.02, corner.shape)
    boxes = np.concatenate([corner, corner + 0.2], axis=1).clip(0, 1).astype(np.float32)
    # Few scores, so that ties are common.
    scores = (rng.integers(1, 12, len(group)) / 12).astype(np.float32)
    order = rng.permutation(len(group))
    return Rows(group[order], scores[order], boxes[order], np.full(len(group), model, np.int32))


def tables(seed):
    # The same objects for all models.
    return [draw_rows(_Twice(seed, model), model) for model in range(3)]


class _Twice:
    """First draw from one generator, all others from another."""

    def __init__(self, seed, model):
        self._first = np.random.default_rng(seed)
        self._rest = np.random.default_rng((seed, model))

    def random(self, shape):
        return self._first.random(shape)

    def __getattr__(self, name):
        return getattr(self._rest, name)


def draw_operators(rng) -> Operators:
    elements = [("both", "both"), ("both", "scores"), ("boxes", "both"), ("scores", "both")]
    return Operators(
        weights=((1.0, 0.5), (0.7, 1.0), (1.0, 1.0))[rng.integers(3)],
        elements=elements[rng.integers(4)],
        vote=(0.0, 0.3, 1.0)[rng.integers(3)],
        box=(0.0, 0.25)[rng.integers(2)],
        nms=("nms", "soft", "adj")[rng.integers(3)],
    )


def by_group(rows: Rows):
    """{group: [(score, box)]}, best first, ties as given."""
    found = {}
    for i in np.argsort(-rows.scores, kind="stable"):
        found.setdefault(int(rows.group[i]), []).append((rows.scores[i], rows.boxes[i]))
    return found


def brute_force(tree, given):
    def visit(node):
        if isinstance(node, Leaf):
            return by_group(given[MODELS.index(node.model)])
        left, right = visit(node.left), visit(node.right)
        merged = {
            group: oracle.join(left.get(group, []), right.get(group, []), node.operators)
            for group in left.keys() | right.keys()
        }
        return {group: rows for group, rows in merged.items() if rows}

    return visit(tree.root)


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_does_what_its_definition_says(seed):
    rng = np.random.default_rng(seed)
    root = Node(Leaf("b"), Node(Leaf("c"), Leaf("a"), draw_operators(rng)), draw_operators(rng))
    tree = Tree(root, MODELS)
    given = tables(seed)
    merged = trees.apply(tree, given)
    expected = brute_force(tree, given)
    found = by_group(merged)
    assert found.keys() == expected.keys()
    for group, rows in expected.items():
        for index, name in enumerate(("score", "box")):
            ours = np.array([row[index] for row in found[group]])
            theirs = np.array([row[index] for row in rows])
            np.testing.assert_allclose(
                ours, theirs, rtol=2e-6, atol=1e-7, err_msg=f"{name} {group}"
            )
    # Sorted by group, then score; models and scores within their ranges.
    assert (np.diff(merged.group) >= 0).all()
    falling = np.diff(merged.scores) <= 0
    assert falling[np.diff(merged.group) == 0].all()
    assert merged.scores.max() <= 1
    assert np.isin(merged.model, range(3)).all()


@pytest.mark.parametrize(
    ("nms", "operator"), [("nms", Nms(0.5)), ("adj", AdjNms(0.5, 0.5)), ("soft", SoftNms())]
)
def test_without_votes_and_merging_a_node_is_the_flat_operator(nms, operator):
    a, b, _ = tables(1)
    tree = Tree(Node(Leaf("a"), Leaf("b"), Operators(nms=nms)), ("a", "b"))
    merged = trees.apply(tree, {"a": a, "b": b})
    names = ("group", "scores", "boxes", "model")
    both = Rows(*(np.concatenate([getattr(a, n), getattr(b, n)]) for n in names))
    flat, _ = apply_operator(both, operator)
    flat = flat.take(np.lexsort((np.arange(len(flat)), -flat.scores, flat.group)))
    for name in ("group", "scores", "boxes", "model"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(flat, name))


def test_the_way_images_are_cut_into_chunks_does_not_matter():
    given = tables(3)
    operators = Operators((1.0, 0.5), vote=0.4, box=0.3, nms="adj")
    tree = Tree(Node(Node(Leaf("a"), Leaf("b"), operators), Leaf("c"), operators), MODELS)
    whole = trees.apply(tree, given)
    parts = [
        trees.apply(
            tree, [rows.take((rows.group >= low) & (rows.group < low + 50)) for rows in given]
        )
        for low in range(0, 200, 50)
    ]
    for name in ("group", "scores", "boxes", "model"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_a_lone_leaf_and_empty_tables_pass():
    a, _, _ = tables(2)
    alone = trees.apply(Tree(Leaf("a"), ("a",)), [a])
    np.testing.assert_array_equal(np.sort(alone.scores), np.sort(a.scores))
    none = a.take(slice(0))
    tree = Tree(Node(Leaf("a"), Leaf("b"), Operators(vote=0.5, nms="adj")), ("a", "b"))
    assert len(trees.apply(tree, [none, none])) == 0
    assert len(trees.apply(tree, [a, none])) > 0


TREE = Tree(
    Node(Leaf("a"), Node(Leaf("b"), Leaf("c"), Operators(nms="soft")), Operators((1.0, 0.5))),
    MODELS,
    sigma=0.3,
)


def test_file_round_trip(tmp_path):
    path = tmp_path / "tree.json"
    trees.save(path, TREE, {"splits": ["x"]})
    assert trees.load(path) == TREE
    assert trees.read_notes(path) == {"splits": ["x"]}
    assert [p.name for p in tmp_path.iterdir()] == ["tree.json"]


def change(**values):
    def edit(content):
        content.update(values)

    return edit


def change_root(**values):
    def edit(content):
        content["root"].update(values)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(kind="x"), 'expected a JSON object with "kind": "ensemble tree"'),
        (change(format=2), "format is 2, this code reads 1"),
        (change(sigma=0), "sigma is 0, expected a number"),
        (change(iou_threshold="a"), "iou_threshold is 'a', expected a number"),
        (change(typo=1), "unknown field 'typo'"),
        (change(models=["a", "b"]), "leaves a, b, c, expected each of models at most once: a, b"),
        (change(root=3), "root is 3, expected an object"),
        (lambda c: c["root"].pop("vote"), "root: field vote is missing"),
        (change_root(nms="wbf"), "root.nms is 'wbf', expected one of nms, soft, adj"),
        (change_root(weights=[1]), "root.weights is \\[1\\], expected a pair"),
        (change_root(weights=[1, 0]), "root.weights is 0, expected a number"),
        (change_root(box=1.5), "root.box is 1.5, expected a number from 0 to 1"),
        (change_root(vote=float("nan")), "NaN is no number of JSON"),
        (change_root(elements=["scores", "boxes"]), '"both" for one child'),
        (change_root(elements=["both", "none"]), "root.elements is 'none'"),
        (lambda c: c["root"]["right"]["left"].update(model=3), "root.right.left.model is 3"),
        (lambda c: c["root"]["right"]["left"].update(model="a"), "leaves a, a, c"),
    ],
)
def test_refuses_a_wrong_file(tmp_path, edit, message):
    content = json.loads(json.dumps(trees.to_json(TREE)))
    edit(content)
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        trees.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_missing_and_cut_files(tmp_path):
    with pytest.raises(UserError, match="cannot read the tree"):
        trees.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"kind"')
    with pytest.raises(UserError, match="no valid JSON"):
        trees.load(tmp_path / "cut.json")


def test_refuses_other_tables():
    rows = tables(0)
    with pytest.raises(UserError, match="2 tables given, the tree joins 3"):
        trees.apply(TREE, rows[:2])
    with pytest.raises(UserError, match="missing c; unknown d"):
        trees.apply(TREE, dict(zip("abd", rows, strict=True)))


def test_paths_name_nodes():
    paths = {path: node for node, path in trees.walk(TREE.root)}
    assert paths["rl"] == Leaf("b") and list(paths) == ["", "l", "r", "rl", "rr"]
    changed = trees.replace_at(TREE.root, "rl", Leaf("d"))
    assert trees.leaves(changed) == ["a", "d", "c"]
    assert dataclasses.replace(TREE, root=changed) != TREE
