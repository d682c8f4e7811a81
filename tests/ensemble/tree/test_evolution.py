"""Changes of trees during a search, and its settings."""

import dataclasses
import json

import numpy as np
import pytest

from common.io.errors import UserError
from common.io.settings import read_settings
from configs.ensemble import auto
from ensemble import draw_tree
from ensemble.settings import EnsembleSettings
from ensemble.tree import binary_tree as trees
from ensemble.tree import evolution
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree


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


def test_changes_keep_models_apart_and_mirrored_trees_are_one():
    rng = np.random.default_rng(0)
    models = [f"m{i}" for i in range(6)]
    order = {model: place for place, model in enumerate(models)}
    options = read_settings(EnsembleSettings, auto.get_config()).search
    space, equal = options.space, options.equal
    root = evolution.starting_trees(dict.fromkeys(models, 0.5), equal)[0]
    seen, sizes = set(), set()
    for step in range(300):
        change = (evolution.change_topology, evolution.change_operators)[step % 2]
        root = evolution.canonical(change(rng, root, space, equal, models), order)
        leaves = trees.leaves(root)
        assert leaves and len(set(leaves)) == len(leaves) and set(leaves) <= set(models)
        sizes.add(len(leaves))
        text = json.dumps(trees.node_to_json(root))
        assert trees.node_from_json(json.loads(text), "x") == root
        seen.add(text)
    assert len(seen) > 200 and min(sizes) <= 2 and max(sizes) == 6
    root = evolution.starting_trees(dict.fromkeys(models, 0.5), equal)[0]
    mirrored = Node(
        root.right,
        root.left,
        dataclasses.replace(
            root.operators,
            weights=root.operators.weights[::-1],
            elements=root.operators.elements[::-1],
        ),
    )
    assert evolution.canonical(mirrored, order) == evolution.canonical(root, order)


def test_starting_trees_are_ladders_and_a_balanced_tree():
    scores = {"a": 0.2, "b": 0.5, "c": 0.4, "d": 0.1, "e": 0.3}
    best, worst, balanced, alone = evolution.starting_trees(scores, Operators())
    assert trees.leaves(best) == list("bcead") and best.left == Leaf("b")
    assert worst.left == Leaf("d") and alone == Leaf("b")
    assert draw_tree._height(best) == 4 and draw_tree._height(balanced) == 3
    assert sorted(trees.leaves(balanced)) == list("abcde")
    assert evolution.starting_trees({"a": 0.1}, Operators()) == [Leaf("a")]


def test_names_are_escaped_in_the_picture():
    root = Node(Leaf("<a>&"), Leaf("b"), Operators(elements=("both", "scores")))
    picture = draw_tree.draw(Tree(root, ("<a>&", "b")), {})
    assert "&lt;a&gt;&amp;" in picture and "scores" in picture
