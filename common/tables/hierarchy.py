"""The class hierarchy as matrices, and parent expansion of detections.

A detection of Man is also one of Person: the OpenImages metric expects every box once per ancestor
class. The metric expands the ground truth itself; predictions are never expanded behind the
user's back, they are by `expand_detections` (`python -m scripts.expand_detections`).

Shape legend: K classes of the dataset, n detections.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from common.io.errors import UserError
from common.tables import Detections

Ancestors = tuple[tuple[int, ...], ...]  # indices of the ancestors of each class


def ancestors(hierarchy: Mapping[str, Any], class_labels: Sequence[str]) -> Bool[np.ndarray, "K K"]:
    """Matrix whose row c marks the ancestors of class c (c itself and the root left out).

    Every occurrence of a label counts: a class listed under two parents has the ancestors of both.
    Nodes that are no class of the list are passed through. `Part` lists are no ancestry.

    Only paths of the file count, as in the official expansion that the metric is defined by
    (oid_hierarchical_labels_expansion.py of the TF Object Detection API): where the children of
    such a class are listed at one of its nodes, they have the ancestors of that node alone. See
    `transitive_closure`.

    Args:
      hierarchy: nested {"LabelName", "Subcategory": [...]} under a virtual root (any label).
      class_labels: labels in the dataset's order.

    Raises:
      UserError: a node without a LabelName.
    """
    index = {label: i for i, label in enumerate(class_labels)}
    matrix = np.zeros((len(class_labels), len(class_labels)), bool)
    pending: list[tuple[Any, tuple[int, ...]]] = [
        (node, ()) for node in hierarchy.get("Subcategory", ())
    ]
    while pending:
        node, above = pending.pop()
        if not isinstance(node, Mapping) or "LabelName" not in node:
            raise UserError(f"hierarchy: a node without LabelName: {str(node)[:80]}")
        place = index.get(node["LabelName"])
        if place is not None:
            matrix[place, list(above)] = True
            above = (*above, place)
        pending.extend((child, above) for child in node.get("Subcategory", ()))
    np.fill_diagonal(matrix, False)
    return matrix


def ancestor_lists(hierarchy: Mapping[str, Any], class_labels: Sequence[str]) -> Ancestors:
    """Of each class the ancestors over all of its nodes, ascending; hashable, for compiled models.

    Args and errors: as `ancestors`.
    """
    matrix = transitive_closure(ancestors(hierarchy, class_labels))
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in matrix)


def ancestor_matrix(lists: Ancestors) -> Bool[np.ndarray, "K K"]:
    """Row c marks the ancestors of class c, as `ancestor_lists` gave them."""
    matrix = np.zeros((len(lists), len(lists)), bool)
    for row, above in zip(matrix, lists, strict=True):
        row[list(above)] = True
    return matrix


def transitive_closure(parents: Bool[np.ndarray, "K K"]) -> Bool[np.ndarray, "K K"]:
    """`ancestors` with the ancestors of ancestors, which differs where a class has several nodes.

    By Warshall's algorithm; the same matrix where the hierarchy is a tree.
    """
    closed = parents.copy()
    for parent in np.flatnonzero(parents.any(axis=0)):
        closed[closed[:, parent]] |= closed[parent]
    np.fill_diagonal(closed, False)
    return closed


def repeat_with(
    classes: Int[np.ndarray, " n"], relatives: Bool[np.ndarray, "K K"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Repeats each element once for its own class and once for each relative of it.

    Args:
      classes: class index per element.
      relatives: row c marks the classes an element of class c is copied to.

    Returns:
      rows: element each copy comes from, non-decreasing.
      copies: class of each copy; an element's own class comes first, relatives in class order.
    """
    table = relatives | np.eye(len(relatives), dtype=bool)
    counts = table.sum(1)
    owner, relative = np.nonzero(table)
    # The own class first within each row of the table.
    order = np.lexsort((relative, relative != owner, owner))
    relative = relative[order]
    starts = np.cumsum(counts) - counts
    repeats = counts[classes]
    rows = np.repeat(np.arange(len(classes)), repeats)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return rows, relative[starts[classes[rows]] + within]


def expand_detections(
    detections: Detections, parents: Bool[np.ndarray, "K K"], class_labels: Sequence[str]
) -> Detections:
    """Copies every detection, box and score, to each ancestor of its class.

    Args:
      detections: rows of whole images; its `labels` must be `class_labels`.
      parents: `ancestors(hierarchy, class_labels)`.
      class_labels: labels in the dataset's order.

    Returns:
      The expanded rows in table order (image, then score descending, ties in input order, a
      detection before its copies), with `expanded: true` in the metadata.

    Raises:
      UserError: the detections are expanded already.
      ValueError: labels in another order.
    """
    if detections.metadata.get("expanded"):
        raise UserError("the detections are expanded to parent classes already")
    if list(detections.labels) != list(class_labels):
        raise ValueError("read the detections with class_labels=dataset.class_labels")
    rows, classes = repeat_with(detections.label_index, parents)
    # `rows` never decreases and the input is sorted, so the copies are sorted too.
    expanded = detections.take(rows)
    metadata = {**detections.metadata, "expanded": True}
    return dataclasses.replace(expanded, label_index=classes.astype(np.int32), metadata=metadata)


def siblings(hierarchy: Mapping[str, Any], class_labels: Sequence[str]) -> Bool[np.ndarray, "K K"]:
    """Symmetric matrix of the pairs of classes that are children of one node.

    Children of the virtual root are no siblings: they have nothing in common.
    """
    index = {label: i for i, label in enumerate(class_labels)}
    matrix = np.zeros((len(class_labels), len(class_labels)), bool)
    pending = list(hierarchy.get("Subcategory", ()))
    while pending:
        children = pending.pop().get("Subcategory", ())
        places = [index[c["LabelName"]] for c in children if c["LabelName"] in index]
        matrix[np.ix_(places, places)] = True
        pending.extend(children)
    np.fill_diagonal(matrix, False)
    return matrix


def restrict(hierarchy: Mapping[str, Any], class_labels: Sequence[str]) -> dict[str, Any]:
    """The hierarchy of some of its classes: others are left out, their children move up."""
    kept = set(class_labels)

    def nodes(children: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        parts = []
        for child in children:
            below = nodes(child.get("Subcategory", ()))
            if child["LabelName"] in kept:
                node = {"LabelName": child["LabelName"]}
                parts.append({**node, "Subcategory": below} if below else node)
            else:
                parts.extend(below)
        return parts

    below = nodes(hierarchy.get("Subcategory", ()))
    return {"LabelName": hierarchy.get("LabelName", "/root"), "Subcategory": below}
