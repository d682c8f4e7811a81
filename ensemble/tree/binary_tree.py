"""The ensemble as a binary tree: detectors are leaves, inner nodes join two children.

`ensemble.search` writes a tree as JSON, `ensemble.merge --config.tree=tree.json` applies it:

    {"kind": "ensemble tree", "format": 1, "models": ["a", "b", "c"],
     "iou_threshold": 0.5, "sigma": 0.5, "min_score": 0.001,
     "root": {"left": {"left": {"model": "a"}, "right": {"model": "b"}, ...},
              "right": {"model": "c"},
              "weights": [1.0, 0.5], "elements": ["both", "scores"],
              "vote": 0.1, "box": 0.3, "nms": "adj"},
     "notes": {...}}

`ensemble.tree.join` says what the fields of a node do. `models` gives the order of the tables;
`notes` (mAP and the like) is not read. A model stands at one leaf, or at none: then its table is
read and not used.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.io.atomic import write_json
from common.io.errors import UserError
from common.io.json_file import read_json
from ensemble.operators.groups import Rows
from ensemble.tree.join import ELEMENTS, NMS_TYPES, NodeRows, join, leaf_rows

KIND, FORMAT = "ensemble tree", 1
_MAX_DEPTH = 200  # levels; a search makes tens


@dataclasses.dataclass(frozen=True)
class Operators:
    """What an inner node does; `ensemble.tree.join` defines the fields."""

    weights: tuple[float, float] = (1.0, 1.0)
    elements: tuple[str, str] = ("both", "both")
    vote: float = 0.0
    box: float = 0.0
    nms: str = "nms"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Detections of one model as they are."""

    model: str


@dataclasses.dataclass(frozen=True)
class Node:
    """Two children and how they are joined."""

    left: "Leaf | Node"
    right: "Leaf | Node"
    operators: Operators = Operators()
    # Subtrees are keys of caches: hashing a whole one each time would be slow.
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_hash", hash((self.left, self.right, self.operators)))

    def __hash__(self) -> int:
        return self._hash


@dataclasses.dataclass(frozen=True)
class Tree:
    """A whole ensemble.

    Attributes:
      root: of the tree; a lone leaf passes its model through.
      models: in the order in which tables are given; some may stand at no leaf.
      iou_threshold: overlap above which two boxes are the same object, in all nodes.
      sigma: of the Gaussian decay.
      min_score: type "soft" drops rows whose score decays below it.
    """

    root: Leaf | Node
    models: tuple[str, ...]
    iou_threshold: float = 0.5
    sigma: float = 0.5
    min_score: float = 1e-3


def leaves(root: Leaf | Node) -> list[str]:
    """Models from left to right."""
    return [node.model for node, _ in walk(root) if isinstance(node, Leaf)]


def walk(root: Leaf | Node, path: str = "") -> Iterator[tuple[Leaf | Node, str]]:
    """All nodes, a parent before its children, with their path of "l" and "r" from the root."""
    yield root, path
    if isinstance(root, Node):
        yield from walk(root.left, path + "l")
        yield from walk(root.right, path + "r")


def replace_at(root: Leaf | Node, path: str, new: Leaf | Node) -> Leaf | Node:
    """The tree with another subtree at `path`."""
    if not path:
        return new
    if isinstance(root, Leaf):
        raise ValueError(f"path {path!r} goes on below a leaf")
    if path[0] == "l":
        return dataclasses.replace(root, left=replace_at(root.left, path[1:], new))
    return dataclasses.replace(root, right=replace_at(root.right, path[1:], new))


def join_children(tree: Tree, operators: Operators, left: NodeRows, right: NodeRows) -> NodeRows:
    """Rows of an inner node."""
    return join(
        left,
        right,
        weights=operators.weights,
        elements=operators.elements,
        vote=operators.vote,
        box=operators.box,
        nms=operators.nms,
        iou_threshold=tree.iou_threshold,
        sigma=tree.sigma,
        min_score=tree.min_score,
    )


def apply(tree: Tree, rows_by_model: Mapping[str, Rows] | Sequence[Rows]) -> Rows:
    """Merges rows of several tables.

    Args:
      tree: the ensemble.
      rows_by_model: rows of each model of the tree; a sequence is in the order of `tree.models`.
        Groups must mean the same in all of them.

    Returns:
      Rows sorted by group, then score descending; `model` is the one whose box was kept, as the
      position in `tree.models`. Scores of up to 1 stay within 1.

    Raises:
      UserError: the models are not those of the tree.
    """
    if not isinstance(rows_by_model, Mapping):
        if len(rows_by_model) != len(tree.models):
            raise UserError(
                f"tree: {len(rows_by_model)} tables given, the tree joins {len(tree.models)}: "
                f"{', '.join(tree.models)}"
            )
        rows_by_model = dict(zip(tree.models, rows_by_model, strict=True))
    check_models(tree, rows_by_model)
    given = [rows_by_model[model] for model in tree.models]
    firsts = np.cumsum([0, *(len(rows.scores) for rows in given)])

    def visit(node: Leaf | Node) -> NodeRows:
        if isinstance(node, Node):
            return join_children(tree, node.operators, visit(node.left), visit(node.right))
        index = tree.models.index(node.model)
        rows = given[index]
        numbers = firsts[index] + np.arange(len(rows.scores))
        return leaf_rows(rows.group, rows.scores, rows.boxes, numbers)

    merged = visit(tree.root)
    return Rows(
        group=merged.group,
        scores=merged.scores,
        boxes=np.ascontiguousarray(merged.columns.T),
        model=(np.searchsorted(firsts, merged.source, "right") - 1).astype(np.int32),
    )


def check_models(tree: Tree, models: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuses tables that are not those of the tree."""
    missing = sorted(set(tree.models) - set(models))
    unknown = sorted(set(models) - set(tree.models))
    if missing or unknown:
        raise UserError(
            f"tree: its models are {', '.join(tree.models)}; "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
        )


def save(path: str | os.PathLike, tree: Tree, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the JSON file, which is seen whole or not at all."""
    write_json(path, to_json(tree, notes))


def load(path: str | os.PathLike) -> Tree:
    """Reads and checks a tree.

    Raises:
      UserError: no such file, no JSON, another format, or a wrong field; the text names it.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the tree ({error})") from error
    return from_json(content, str(path))


def read_notes(path: str | os.PathLike) -> dict[str, Any]:
    """The notes of a tree file."""
    load(path)
    return read_json(path).get("notes", {})


def to_json(tree: Tree, notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a tree file."""
    settings = {name: getattr(tree, name) for name in ("iou_threshold", "sigma", "min_score")}
    content = {"kind": KIND, "format": FORMAT, "models": list(tree.models), **settings}
    content["root"] = node_to_json(tree.root)
    if notes:
        content["notes"] = dict(notes)
    return content


def node_to_json(node: Leaf | Node) -> dict[str, Any]:
    if isinstance(node, Leaf):
        return {"model": node.model}
    return {
        "left": node_to_json(node.left),
        "right": node_to_json(node.right),
        **dataclasses.asdict(node.operators),
    }


def from_json(content: Any, name: str) -> Tree:
    """Tree of the content of a file; `name` stands in error messages."""
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f'{name}: no ensemble tree, expected a JSON object with "kind": "{KIND}"')
    if content.get("format") != FORMAT:
        raise UserError(
            f"{name}: field format is {content.get('format')!r}, this code reads {FORMAT}"
        )
    fields = {"kind", "format", "models", "root", "iou_threshold", "sigma", "min_score"}
    _check_fields(content, fields, {"notes"}, name)
    models = content["models"]
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise UserError(f"{name}: models is {models!r:.80}, expected a list of names")
    largest = float(np.finfo(float).max)
    limits = {"iou_threshold": (0, 1), "sigma": (1e-6, largest), "min_score": (0, 1)}
    settings = {
        key: _number(content[key], *limit, f"{name}: {key}") for key, limit in limits.items()
    }
    root = node_from_json(content["root"], name)
    leaf_models = leaves(root)
    if len(set(leaf_models)) != len(leaf_models) or not set(leaf_models) <= set(models):
        raise UserError(
            f"{name}: leaves {', '.join(leaf_models)}, expected each of models at most once: "
            f"{', '.join(models)}"
        )
    return Tree(root=root, models=tuple(models), **settings)


def node_from_json(content: Any, name: str, place: str = "root") -> Leaf | Node:
    """Subtree of its JSON form; `place` says in error messages where it stands."""
    where = f"{name}: {place}"
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r:.80}, expected an object")
    if place.count(".") > _MAX_DEPTH:
        raise UserError(f"{name}: a tree of more than {_MAX_DEPTH} levels")
    if "model" in content:
        _check_fields(content, {"model"}, set(), where)
        if not isinstance(content["model"], str):
            raise UserError(f"{where}.model is {content['model']!r}, expected a name")
        return Leaf(content["model"])
    names = {field.name for field in dataclasses.fields(Operators)}
    _check_fields(content, names | {"left", "right"}, set(), where)
    weights, elements = content["weights"], content["elements"]
    for key, pair in (("weights", weights), ("elements", elements)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}.{key} is {pair!r}, expected a pair (left, right)")
    for element in elements:
        _choice(element, ELEMENTS, f"{where}.elements")
    if "both" not in elements:
        raise UserError(f'{where}.elements is {elements!r}, expected "both" for one child at least')

    def number(weight: Any) -> float:
        return _number(weight, 1e-6, 1e6, f"{where}.weights")

    operators = Operators(
        weights=(number(weights[0]), number(weights[1])),
        elements=(elements[0], elements[1]),
        vote=_number(content["vote"], 0, 1e6, f"{where}.vote"),
        box=_number(content["box"], 0, 1, f"{where}.box"),
        nms=_choice(content["nms"], NMS_TYPES, f"{where}.nms"),
    )
    left, right = (node_from_json(content[s], name, f"{place}.{s}") for s in ("left", "right"))
    return Node(left, right, operators)


def _check_fields(content: dict, needed: set[str], optional: set[str], where: str) -> None:
    for field in sorted(needed - set(content)):
        raise UserError(f"{where}: field {field} is missing")
    for field in sorted(set(content) - needed - optional):
        raise UserError(f"{where}: unknown field {field!r}, expected {', '.join(sorted(needed))}")


def _number(value: Any, low: float, high: float, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good:
        raise UserError(f"{where} is {value!r}, expected a number from {low:g} to {high:g}")
    return float(value)


def _choice(value: Any, choices: Sequence[str], where: str) -> str:
    if value not in choices:
        raise UserError(f"{where} is {value!r}, expected one of {', '.join(choices)}")
    return value
