"""The class list of a model, and datasets with their classes put into its order.

A model's outputs are numbers; which class each of them is stands in the work directory, in the
`classes.csv` and `hierarchy.json` that its training wrote. A dataset may list its classes in
another order, or only some of them: its annotations are then renumbered by label, so that no output
is called by the name of another class.

Shape legend: K classes of the model, C classes of a dataset.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from common.data.dataset import Dataset, read_classes
from common.data.dataset_check import check_tree
from common.data.dataset_writer import write_classes
from common.io.atomic import write_text
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike, to_epath

_MAX_NAMED = 5  # labels spelled out in an error
# Lists of dataset.json with one entry a class -> what a class that the dataset lacks has there.
_BY_CLASS = {"category_ids": None, "frequency": "f"}


@dataclasses.dataclass(frozen=True)
class ModelClasses:
    """What the outputs of a model stand for.

    Attributes:
      source: where the list was read, for errors.
      labels: (K,) unique, in the order of the outputs.
      names: (K,) to show.
      hierarchy: nested dictionary of the labels under a virtual root.
    """

    source: str
    labels: Sequence[str]
    names: Sequence[str]
    hierarchy: dict[str, Any]

    @property
    def count(self) -> int:
        return len(self.labels)


def read_model_classes(workdir: PathLike) -> ModelClasses:
    """The classes that a training wrote into its work directory.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    folder = to_epath(workdir)
    path = folder / "classes.csv"
    if not path.exists():
        raise UserError(
            f"{path}: no such file, expected the classes of the model in the order of its outputs "
            "(training writes it; of an older run copy classes.csv and hierarchy.json of the "
            "dataset directory it was trained on)"
        )
    labels, names = read_classes(path)
    tree = folder / "hierarchy.json"
    try:
        hierarchy = read_json(tree)
    except OSError as error:
        raise UserError(f"{tree}: cannot read the hierarchy ({error})") from error
    check_tree(tree, hierarchy)
    return ModelClasses(str(path), labels, names, hierarchy)


def write_model_classes(
    workdir: PathLike, labels: Sequence[str], names: Sequence[str], hierarchy: dict[str, Any]
) -> None:
    """Writes the classes of a new model, in the order of its outputs."""
    folder = to_epath(workdir)
    # The list itself comes last: where it lies, the hierarchy does, too.
    write_text(folder / "hierarchy.json", json.dumps(hierarchy, indent=1) + "\n")
    write_classes(folder / "classes.csv", labels, names)


def with_model_classes(dataset: Dataset, classes: ModelClasses) -> Dataset:
    """The dataset with the class list of a model, its annotations renumbered by label.

    A dataset of the same list is given back as it is. Its own hierarchy stays where it has all of
    the model's classes.

    Raises:
      UserError: it has classes that the model lacks.
    """
    if list(dataset.class_labels) == list(classes.labels):
        return dataset
    place = {label: index for index, label in enumerate(classes.labels)}
    unknown = [label for label in dataset.class_labels if label not in place]
    if unknown:
        raise UserError(
            f"{dataset.directory}/classes.csv: {len(unknown)} of {dataset.num_classes} classes are "
            f"none of the model's: {_some(unknown)}; expected labels of {classes.source} "
            f"({_some(classes.labels)})"
        )
    target = np.array([place[label] for label in dataset.class_labels], np.int32)
    complete = len(target) == classes.count
    return dataclasses.replace(
        dataset,
        meta=_renumbered_lists(dataset.meta, target, classes.count),
        class_labels=list(classes.labels),
        class_names=list(classes.names),
        hierarchy=dataset.hierarchy if complete else classes.hierarchy,
        box_classes=target[dataset.box_classes],
        label_classes=target[dataset.label_classes],
    )


def photos_for_model(dataset: Dataset, classes: ModelClasses) -> Dataset:
    """The photos of a dataset of any classes, without its annotations, for a model."""
    none = np.zeros(0, np.int32)
    return dataclasses.replace(
        dataset,
        meta={key: value for key, value in dataset.meta.items() if key not in _BY_CLASS},
        class_labels=list(classes.labels),
        class_names=list(classes.names),
        hierarchy=classes.hierarchy,
        box_offsets=np.zeros_like(dataset.box_offsets),
        boxes=np.zeros((0, 4), np.float32),
        box_classes=none,
        box_flags=none.astype(np.uint8),
        label_offsets=np.zeros_like(dataset.label_offsets),
        label_classes=none,
        label_confidences=none.astype(np.uint8),
        mask_offsets=None,
        box_areas=None,
        whole_boxes=None,
    )


def _renumbered_lists(
    meta: dict[str, Any], target: Int32[np.ndarray, " C"], count: int
) -> dict[str, Any]:
    """dataset.json with its lists of one entry a class in the order of the model's classes."""
    lists = {}
    for key, absent in _BY_CLASS.items():
        if key in meta:
            values = [absent] * count
            for index, value in zip(target.tolist(), meta[key], strict=True):
                values[index] = value
            lists[key] = values
    return {**meta, **lists}


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_MAX_NAMED]) + (", ..." if len(labels) > _MAX_NAMED else "")
