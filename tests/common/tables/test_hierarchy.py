"""Ancestors from the hierarchy and parent expansion of detections."""

import dataclasses

import numpy as np
import pytest

from common.io.errors import UserError
from common.tables import Detections
from common.tables.hierarchy import ancestors, expand_detections, transitive_closure

LABELS = ["person", "man", "animal", "dog", "puppy"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {"LabelName": "person", "Subcategory": [{"LabelName": "man"}]},
        {
            "LabelName": "animal",
            "Part": [{"LabelName": "man"}],
            "Subcategory": [
                {
                    "LabelName": "not in the list",
                    "Subcategory": [{"LabelName": "dog", "Subcategory": [{"LabelName": "puppy"}]}],
                }
            ],
        },
        {"LabelName": "pet", "Subcategory": [{"LabelName": "dog"}, {"LabelName": "man"}]},
    ],
}


def names(matrix, label):
    return {LABELS[i] for i in np.flatnonzero(matrix[LABELS.index(label)])}


def test_ancestors_skip_the_root_parts_and_unlisted_nodes():
    matrix = ancestors(HIERARCHY, LABELS)
    assert names(matrix, "person") == set()
    assert names(matrix, "man") == {"person"}
    assert names(matrix, "dog") == {"animal"}
    assert names(matrix, "puppy") == {"dog", "animal"}


def test_a_class_under_two_parents_has_the_ancestors_of_both():
    labels = [*LABELS, "pet"]
    matrix = ancestors(HIERARCHY, labels)
    assert {labels[i] for i in np.flatnonzero(matrix[1])} == {"person", "pet"}
    assert {labels[i] for i in np.flatnonzero(matrix[3])} == {"animal", "pet"}


def test_the_closure_has_the_ancestors_of_all_nodes_of_a_class():
    puppy = {"LabelName": "puppy"}
    hierarchy = {
        "Subcategory": [
            {"LabelName": "pet", "Subcategory": [{"LabelName": "dog"}]},
            {"LabelName": "animal", "Subcategory": [{"LabelName": "dog", "Subcategory": [puppy]}]},
            {"LabelName": "man", "Subcategory": [{"LabelName": "pet"}]},
        ]
    }
    labels = [*LABELS, "pet"]
    matrix = ancestors(hierarchy, labels)
    closed = transitive_closure(matrix)

    def above(relation, label):
        return {labels[i] for i in np.flatnonzero(relation[labels.index(label)])}

    assert above(matrix, "puppy") == {"dog", "animal"}, "as the official expansion of the metric"
    assert above(closed, "puppy") == {"dog", "animal", "pet", "man"}
    assert above(closed, "dog") == {"animal", "pet", "man"}
    tree = ancestors(HIERARCHY, LABELS)
    np.testing.assert_array_equal(transitive_closure(tree), tree)


def test_a_flat_list_or_an_empty_hierarchy_has_no_ancestors():
    flat = {"LabelName": "root", "Subcategory": [{"LabelName": label} for label in LABELS]}
    assert not ancestors(flat, LABELS).any()
    assert not ancestors({"LabelName": "root"}, LABELS).any()


def test_a_node_without_a_label_is_named():
    with pytest.raises(UserError, match="without LabelName"):
        ancestors({"LabelName": "root", "Subcategory": [{"Label": "x"}]}, LABELS)


def test_expansion_copies_box_and_score_to_every_ancestor_in_table_order():
    detections = Detections(
        image_ids=["a", "b"],
        labels=LABELS,
        image_index=np.array([0, 0, 1], np.int32),
        label_index=np.array([4, 0, 1], np.int32),
        scores=np.array([0.9, 0.5, 0.7], np.float32),
        boxes=np.arange(12, dtype=np.float32).reshape(3, 4) / 12,
        metadata={"model": "m"},
    )
    parents = ancestors(HIERARCHY, LABELS)
    expanded = expand_detections(detections, parents, LABELS)
    assert [LABELS[i] for i in expanded.label_index] == [
        *("puppy", "animal", "dog"),
        "person",
        *("man", "person"),
    ]
    np.testing.assert_array_equal(expanded.image_index, [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(expanded.scores, detections.scores[[0, 0, 0, 1, 2, 2]])
    np.testing.assert_array_equal(expanded.boxes, detections.boxes[[0, 0, 0, 1, 2, 2]])
    assert expanded.metadata == {"model": "m", "expanded": True}
    with pytest.raises(UserError, match="already"):
        expand_detections(expanded, parents, LABELS)
    other = dataclasses.replace(detections, labels=LABELS[::-1])
    with pytest.raises(ValueError, match="class_labels"):
        expand_detections(other, parents, LABELS)
