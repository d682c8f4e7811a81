"""Datasets in the class order of a model: a label never moves to another object."""

import dataclasses

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.data.model_classes import (
    photos_for_model,
    read_model_classes,
    with_model_classes,
    write_model_classes,
)
from common.io.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny", num_images=4))


def model_of(dataset: Dataset, folder, labels):
    """The classes of a model that was trained with `labels`."""
    names = [label.title() for label in labels]
    hierarchy = {"LabelName": "root", "Subcategory": [{"LabelName": label} for label in labels]}
    other = dataclasses.replace(
        dataset, class_labels=labels, class_names=names, hierarchy=hierarchy
    )
    write_model_classes(folder, other.class_labels, other.class_names, other.hierarchy)
    return read_model_classes(folder)


def labels_of(dataset: Dataset) -> list[list[str]]:
    """Labels of the boxes and of the image-level labels of each image."""
    name = np.array(dataset.class_labels)
    return [
        [*name[dataset.image_boxes(i)[1]], "|", *name[dataset.image_labels(i)[0]]]
        for i in range(dataset.num_images)
    ]


def test_the_same_list_changes_nothing(dataset, tmp_path):
    classes = model_of(dataset, tmp_path, ["red", "green", "blue"])
    assert with_model_classes(dataset, classes) is dataset


@pytest.mark.parametrize(
    "labels", [["blue", "green", "red"], ["green", "grey", "blue", "white", "red"]]
)
def test_annotations_keep_their_labels_in_the_order_of_the_model(dataset, tmp_path, labels):
    classes = model_of(dataset, tmp_path, labels)
    seen = with_model_classes(dataset, classes)
    assert seen.class_labels == labels and seen.num_classes == len(labels)
    assert labels_of(seen) == labels_of(dataset)
    assert seen.class_names == [label.title() for label in labels]


def test_lists_of_one_entry_a_class_follow(dataset, tmp_path):
    meta = {**dataset.meta, "category_ids": [7, 8, 9], "frequency": ["r", "c", "f"]}
    classes = model_of(dataset, tmp_path, ["blue", "grey", "red", "green"])
    seen = with_model_classes(dataclasses.replace(dataset, meta=meta), classes)
    assert seen.meta["category_ids"] == [9, None, 7, 8]
    assert [seen.meta["frequency"][i] for i in (0, 2, 3)] == ["f", "r", "c"]


def test_classes_that_the_model_lacks_are_refused_with_both_lists(dataset, tmp_path):
    classes = model_of(dataset, tmp_path, ["cat", "red", "dog"])
    with pytest.raises(UserError) as error:
        with_model_classes(dataset, classes)
    text = str(error.value)
    assert "2 of 3 classes are none of the model's: green, blue" in text and "\n" not in text
    assert str(tmp_path / "classes.csv") in text and "cat, red, dog" in text


def test_photos_of_any_classes_can_be_taken_without_their_annotations(dataset, tmp_path):
    classes = model_of(dataset, tmp_path, ["cat", "dog"])
    photos = photos_for_model(dataset, classes)
    assert photos.class_labels == ["cat", "dog"]
    assert photos.num_images == dataset.num_images
    assert labels_of(photos) == [["|"]] * dataset.num_images


def test_a_work_directory_without_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"classes.csv: no such file"):
        read_model_classes(tmp_path)


@pytest.mark.parametrize("tree", ["5", '{"LabelName": "root", "Subcategory": [7]}', "{"])
def test_a_broken_tree_in_a_work_directory_is_refused(dataset, tmp_path, tree):
    model_of(dataset, tmp_path, ["red"])
    (tmp_path / "hierarchy.json").write_text(tree)
    with pytest.raises(UserError, match=r"hierarchy.json: (a node without|no valid JSON)"):
        read_model_classes(tmp_path)
