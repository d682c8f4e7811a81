"""Search over ensemble trees: by evolution, in the paper's two stages or jointly.

A stage keeps a population of the best trees found. Each step draws a few of them, changes the best
of these at random and scores the result, which takes the place of the worst tree of the population
if it beats it. Stages differ in what may change:

    topology   subtrees are moved or swapped, models left out and taken back; all nodes have the
               same operators (stage 1)
    operators  one setting of one node is drawn anew, the tree stands (stage 2)
    joint      either: one stage over the whole space

All state is in `State`, which is JSON: a search that goes on from a saved state takes the same way
as one that was never interrupted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.tree import binary_tree as trees
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree
from ensemble.tree.join import ELEMENTS, NMS_TYPES

MOVES = {"topology": ("topology",), "operators": ("operators",), "joint": ("topology", "operators")}
_REDRAWS = 50  # changes tried before a tree is scored a second time


@dataclasses.dataclass(frozen=True)
class Space:
    """What the operators of a node may be.

    Attributes:
      weights: of a child's scores; the larger one of a node is 1.
      votes: weights of the partner's score.
      boxes: weights of the partner's box.
      nms: types.
      elements: what of a child may be used alone ("scores", "boxes"), beside "both".
    """

    weights: tuple[float, ...]
    votes: tuple[float, ...]
    boxes: tuple[float, ...]
    nms: tuple[str, ...] = NMS_TYPES
    elements: tuple[str, ...] = ELEMENTS


@dataclasses.dataclass
class State:
    """Where a search stands.

    Attributes:
      stage: index of the running stage; the number of stages when done.
      tried: trees scored in this stage.
      population: (score, root) of the best trees of this stage, best first.
      winners: best tree of each finished stage.
      best: best (score, root) of all.
      seen: digests of the trees that were scored.
      history: {"tried", "tune", "report"...} whenever a better tree was found.
      seconds: spent so far.
      rng: state of the random generator.
    """

    stage: int = 0
    tried: int = 0
    population: list[tuple[float, Leaf | Node]] = dataclasses.field(default_factory=list)
    winners: list[tuple[float, Leaf | Node]] = dataclasses.field(default_factory=list)
    best: tuple[float, Leaf | Node] | None = None
    seen: set[str] = dataclasses.field(default_factory=set)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    rng: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        def pair(item):
            return None if item is None else [item[0], trees.node_to_json(item[1])]

        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["population"] = [pair(item) for item in self.population]
        content["winners"] = [pair(item) for item in self.winners]
        content["best"] = pair(self.best)
        content["seen"] = sorted(self.seen)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any], name: str) -> "State":
        def pair(item):
            return None if item is None else (item[0], trees.node_from_json(item[1], name))

        content = dict(content)
        content["population"] = [pair(item) for item in content["population"]]
        content["winners"] = [pair(item) for item in content["winners"]]
        content["best"] = pair(content["best"])
        content["seen"] = set(content["seen"])
        return cls(**content)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: a key of `MOVES`, and how many trees to score."""

    moves: str
    num_trees: int


def search(
    settings: Tree,
    single_scores: Mapping[str, float],
    stages: Sequence[Stage],
    score: Callable[[Tree], float],
    *,
    space: Space,
    equal: Operators,
    population: int,
    tournament: int,
    seed: int,
    state: State | None = None,
    after_tree: Callable[[State, bool], None] = lambda state, improved: None,
) -> State:
    """Runs or goes on with a search.

    Args:
      settings: models and thresholds; its root is not used.
      single_scores: mAP of each model, for the trees to begin with.
      stages: in order; each begins with the winner of the one before.
      score: mAP of a tree.
      space: of the operators.
      equal: operators of nodes with equal contributions.
      population: trees kept.
      tournament: trees drawn from it as candidates for the next change.
      seed: of all random draws.
      state: to go on from.
      after_tree: called after each scored tree with the state and whether the tree is the best.

    Returns:
      The final state; its `best` is the tree.
    """
    state = state or State(rng=dict(np.random.PCG64(seed).state))
    rng = np.random.Generator(np.random.PCG64())
    assert state.rng is not None
    rng.bit_generator.state = dict(state.rng)
    order = {model: place for place, model in enumerate(settings.models)}
    starts = starting_trees(single_scores, equal)
    while state.stage < len(stages):
        stage = stages[state.stage]
        while state.tried < stage.num_trees:
            if state.tried < len(starts) and not state.winners:
                root = canonical(starts[state.tried], order)
            elif not state.population:
                root = state.winners[-1][1]
            else:
                root = _propose(rng, state, stage.moves, space, equal, tournament, order)
            value = score(dataclasses.replace(settings, root=root))
            state.seen.add(digest(root))
            state.tried += 1
            state.population.append((value, root))
            state.population.sort(key=lambda item: -item[0])
            del state.population[population:]
            improved = state.best is None or value > state.best[0]
            if improved:
                state.best = (value, root)
            state.rng = rng.bit_generator.state
            after_tree(state, improved)
        if state.population:
            state.winners.append(state.population[0])
        state.stage, state.tried, state.population = state.stage + 1, 0, []
    return state


def starting_trees(single_scores: Mapping[str, float], equal: Operators) -> list[Leaf | Node]:
    """Ladders with the best and with the worst model nearest to the root, a balanced tree, and the
    best model alone."""
    models = sorted(single_scores, key=lambda model: (-single_scores[model], model))
    ranked: list[Leaf | Node] = [Leaf(model) for model in models]
    if len(ranked) < 2:
        return list(ranked)

    def ladder(leaves):
        root = leaves[-1]
        for leaf in reversed(leaves[:-1]):
            root = Node(leaf, root, equal)
        return root

    level: list[Leaf | Node] = list(ranked)
    while len(level) > 1:
        # Neighbours in rank are joined; an odd one waits.
        pairs = [Node(a, b, equal) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = [*pairs, *level[len(level) - len(level) % 2 :]]
    distinct: list[Leaf | Node] = []
    for root in (ladder(ranked), ladder(ranked[::-1]), level[0], ranked[0]):
        if root not in distinct:
            distinct.append(root)
    return distinct


def _propose(rng, state, moves, space, equal, tournament, order) -> Leaf | Node:
    """A change of a good tree that was not scored yet (or, in a tiny space, one that was)."""
    for _ in range(_REDRAWS):
        drawn = rng.integers(len(state.population), size=tournament).min()
        root = state.population[drawn][1]
        # A second and third change with falling probability, to leave local optima.
        while True:
            move = MOVES[moves][rng.integers(len(MOVES[moves]))]
            change = change_topology if move == "topology" else change_operators
            root = canonical(change(rng, root, space, equal, list(order)), order)
            if rng.random() > 0.3:
                break
        if digest(root) not in state.seen:
            break
    return root


def change_topology(
    rng: np.random.Generator, root, space: Space, equal: Operators, models: Sequence[str]
):
    """Moves a random subtree to a random edge, swaps two, leaves a model out or takes one back."""
    del space
    nodes = list(trees.walk(root))
    absent = [model for model in models if model not in trees.leaves(root)]
    kind = rng.random()
    if absent and (kind < 0.25 or len(nodes) < 5):
        new = Leaf(absent[rng.integers(len(absent))])
        node, place = nodes[rng.integers(len(nodes))]
        return trees.replace_at(root, place, Node(node, new, equal))
    if len(nodes) > 1 and (kind < 0.4 or len(nodes) < 5):
        paths = [path for node, path in nodes if isinstance(node, Leaf)]
        path = paths[rng.integers(len(paths))]
        return trees.replace_at(root, path[:-1], _subtree(root, _sibling(path)))
    if len(nodes) < 5:
        return root  # there is one model
    _, path = nodes[1 + rng.integers(len(nodes) - 1)]
    if rng.random() < 0.5:
        others = [
            (node, other)
            for node, other in nodes[1:]
            if not other.startswith(path) and not path.startswith(other)
        ]
        _, other = others[rng.integers(len(others))]
        first, second = _subtree(root, path), _subtree(root, other)
        return trees.replace_at(trees.replace_at(root, path, second), other, first)
    moved = _subtree(root, path)
    pruned = trees.replace_at(root, path[:-1], _subtree(root, _sibling(path)))
    places = list(trees.walk(pruned))
    node, place = places[rng.integers(len(places))]
    return trees.replace_at(pruned, place, Node(node, moved, equal))


def _sibling(path: str) -> str:
    return path[:-1] + ("r" if path[-1] == "l" else "l")


def change_operators(
    rng: np.random.Generator, root, space: Space, equal: Operators, models: Sequence[str]
):
    """Draws one setting of one node anew."""
    nodes = [(node, path) for node, path in trees.walk(root) if isinstance(node, Node)]
    if not nodes:  # one model: a second joins it
        return change_topology(rng, root, space, equal, models)
    node, path = nodes[rng.integers(len(nodes))]
    old = node.operators
    field = ("weights", "weights", "vote", "box", "nms", "elements")[rng.integers(6)]
    if field == "weights":
        weights = [1.0, space.weights[rng.integers(len(space.weights))]]
        if rng.random() < 0.5:
            weights.reverse()
        new: Any = tuple(weight / max(weights) for weight in weights)
    elif field == "elements":
        pair = ["both", space.elements[rng.integers(len(space.elements))]]
        new = tuple(pair[::-1] if rng.random() < 0.5 else pair)
    else:
        values = {"vote": space.votes, "box": space.boxes, "nms": space.nms}[field]
        new = values[rng.integers(len(values))]
    changes: dict[str, Any] = {field: new}
    operators = dataclasses.replace(old, **changes)
    return trees.replace_at(root, path, dataclasses.replace(node, operators=operators))


def canonical(root: Leaf | Node, order: Mapping[str, int]) -> Leaf | Node:
    """The same ensemble with the child first that holds the first model, in all nodes.

    So mirrored trees are one tree, and their subtrees one entry of the caches.
    """
    return _canonical(root, order)[0]


def _canonical(root, order):
    if isinstance(root, Leaf):
        return root, order[root.model]
    (left, first), (right, second) = (_canonical(c, order) for c in (root.left, root.right))
    operators = root.operators
    if first > second:
        left, right = right, left
        operators = dataclasses.replace(
            operators, weights=operators.weights[::-1], elements=operators.elements[::-1]
        )
    return Node(left, right, operators), min(first, second)


def digest(root: Leaf | Node) -> str:
    """Short name of a tree."""
    text = json.dumps(trees.node_to_json(root), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _subtree(root: Leaf | Node, path: str) -> Leaf | Node:
    for step in path:
        assert isinstance(root, Node)
        root = root.left if step == "l" else root.right
    return root
