"""All values of a trained detector as the start of another one, also with another class list.

Layers that have outputs for each class are matched by the labels of the classes: the rows of a
class that both models know are copied, the others keep the new model's values.

    classifier  0 to 2 outputs of background and object (`detection.classifiers`), then K
    regressor   4 K outputs, class after class; 4 where all classes share a box
    predictor   of a mask head: K outputs; 1 where all classes share a mask

A weights file (`.safetensors`) has the '/'-joined paths of the variables as keys, such as
`params/box_head/classifier/kernel`, and as metadata the labels, names and hierarchy of the classes
and the config of the run.

Shape legend: K classes of the new model, k classes of the trained one, D features.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.nn.weights.backbone_weights import State, read_safetensors

LEADING_OUTPUTS = (0, 1, 2)  # of a classifier, before those of its classes
_CLASSIFIER, _REGRESSOR = "classifier", "regressor"
_MAX_NAMED = 50  # labels or arrays that a report spells out


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model as it lies on disk.

    Attributes:
      source: where it was read from.
      labels: of its classes, in the order of its outputs.
      weights: values of params and batch_stats by '/'-joined path.
      names: to show of the classes; () where they are not known.
      hierarchy: of the labels, a nested dictionary; None where it is not known.
      config: of its run, nested dictionaries; None where it is not known.
    """

    source: str
    labels: Sequence[str]
    weights: State
    names: Sequence[str] = ()
    hierarchy: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class FineTuningReport:
    """What a new model took of a trained one.

    Attributes:
      source: the trained model.
      taken: paths of arrays that were copied whole.
      matched: paths of arrays of which the outputs of shared classes were copied.
      other_shape: paths of arrays whose shapes differ, with both shapes.
      missing: paths of the new model that the trained one lacks.
      unused: paths of the trained model that the new one lacks.
      shared: labels that both models know.
      new: labels that only the new model knows.
      given_up: labels that only the trained model knows.
    """

    source: str
    taken: list[str]
    matched: list[str]
    other_shape: list[str]
    missing: list[str]
    unused: list[str]
    shared: list[str]
    new: list[str]
    given_up: list[str]

    def __str__(self) -> str:
        lines = [
            f"init_from: {self.source}: {len(self.taken)} arrays taken whole, "
            f"{len(self.matched)} by class",
            f"init_from: {len(self.shared)} classes shared by label",
        ]
        for title, names in (
            ("new classes, at their random start", self.new),
            ("classes of the trained model that this run lacks", self.given_up),
            ("arrays not taken, of another shape", self.other_shape),
            ("arrays that the trained model lacks, at their random start", self.missing),
            ("arrays of the trained model that this one lacks", self.unused),
        ):
            if names:
                more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
                lines.append(
                    f"init_from: {len(names)} {title}: {', '.join(names[:_MAX_NAMED])}{more}"
                )
        return "\n".join(lines)


def fine_tuned(
    variables: Mapping[str, Any], labels: Sequence[str], trained: TrainedModel
) -> tuple[dict[str, Any], FineTuningReport]:
    """The variables of a new model with all values of a trained one that fit.

    Args:
      variables: {'params', 'batch_stats'} of the new model, NumPy.
      labels: (K,) of its classes.
      trained: the other one.

    Raises:
      UserError: no array of the trained model fits, or its labels are not those of its classes.
    """
    _refuse_other_labels(trained)
    flat = dict(traverse_util.flatten_dict(dict(variables), sep="/"))
    place = {label: index for index, label in enumerate(trained.labels)}
    pairs = [(index, place[label]) for index, label in enumerate(labels) if label in place]
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    sizes = len(labels), len(trained.labels)
    taken, matched, other_shape = [], [], []
    for path, value in flat.items():
        if path not in trained.weights:
            continue
        old = trained.weights[path]
        outputs = _class_outputs(path, value, old, sizes)
        if outputs is not None:
            flat[path] = _with_shared_classes(value, old, rows, *outputs)
            matched.append(path)
        elif value.shape == old.shape and path.split("/")[-2] != _CLASSIFIER:
            flat[path] = old.astype(value.dtype)
            taken.append(path)
        else:
            other_shape.append(f"{path} (found {old.shape}, expected {value.shape})")
    if not taken:
        raise UserError(
            f"{trained.source}: found arrays such as {next(iter(trained.weights), 'none')!r}, "
            "none of which fits this model; expected a trained detector (config.init_from)"
        )
    known = set(labels)
    report = FineTuningReport(
        source=trained.source,
        taken=taken,
        matched=matched,
        other_shape=other_shape,
        missing=[path for path in flat if path not in trained.weights],
        unused=[path for path in trained.weights if path not in flat],
        shared=[label for label in labels if label in place],
        new=[label for label in labels if label not in place],
        given_up=[label for label in trained.labels if label not in known],
    )
    return traverse_util.unflatten_dict(flat, sep="/"), report


def _refuse_other_labels(trained: TrainedModel) -> None:
    for path, value in trained.weights.items():
        layer, found = path.split("/")[-2:], len(trained.labels)
        if layer == [_CLASSIFIER, "kernel"]:
            fits = value.shape[-1] - found in LEADING_OUTPUTS
        elif layer == [_REGRESSOR, "kernel"]:
            fits = value.shape[-1] in (4, 4 * found)
        else:
            continue
        if not fits:
            raise UserError(
                f"{trained.source}: found {found} labels, expected one for each class of the "
                f"{value.shape[-1]} outputs of {path}"
            )


def _class_outputs(
    path: str, new: np.ndarray, old: np.ndarray, sizes: tuple[int, int]
) -> tuple[int, int] | None:
    """(first, width) of the outputs of classes of an array, None where it has none.

    The outputs of class c are [first + c * width, first + (c + 1) * width) on the last axis.
    """
    if new.shape[:-1] != old.shape[:-1]:
        return None
    layer = path.split("/")[-2]
    outputs = new.shape[-1], old.shape[-1]
    leading = {count - size for count, size in zip(outputs, sizes, strict=True)}
    if layer == _CLASSIFIER and len(leading) == 1 and leading <= set(LEADING_OUTPUTS):
        return leading.pop(), 1
    # One box for all classes is no row of a class, even if there is only one class.
    if layer == _REGRESSOR and outputs == tuple(4 * size for size in sizes) != (4, 4):
        return 0, 4
    if layer == "predictor" and outputs == sizes != (1, 1):
        return 0, 1
    return None


def _with_shared_classes(
    new: np.ndarray, old: np.ndarray, rows: np.ndarray, first: int, width: int
) -> np.ndarray:
    """`new` with what comes before the classes, and the shared classes, of `old`."""
    result = np.array(new)
    result[..., :first] = old[..., :first]
    offsets = first + np.arange(width)
    ours, theirs = (width * rows[:, side, None] + offsets for side in (0, 1))
    result[..., ours.ravel()] = old[..., theirs.ravel()]
    return result


def save_trained_model(path: str | Path, model: TrainedModel) -> None:
    """Writes a weights file, local or gs://, atomically.

    Raises:
      UserError: the file cannot be written.
    """
    metadata = {
        "source": model.source,
        "labels": json.dumps(list(model.labels)),
        "names": json.dumps(list(model.names)),
        "hierarchy": json.dumps(model.hierarchy),
        "config": json.dumps(model.config),
    }
    weights = {name: np.ascontiguousarray(value) for name, value in model.weights.items()}
    with open_atomic(path, "wb") as file:
        file.write(safetensors_numpy.save(weights, metadata))


def read_trained_model(path: str | Path) -> TrainedModel:
    """Reads a file of `save_trained_model`.

    Raises:
      UserError: no such file, no readable one, or one without the labels of its classes (a JSON
        list of texts, each once).
    """
    weights = read_safetensors(path)
    with epath.Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.get("__metadata__", {})
    labels = metadata.get("labels")
    if labels is None:
        raise UserError(
            f"{path}: found no labels of classes in the metadata, expected a whole detector of "
            "scripts.export_weights (a backbone alone is config.model.pretrained)"
        )
    try:
        names, hierarchy, config = (
            json.loads(metadata.get(key, "null")) for key in ("names", "hierarchy", "config")
        )
    except ValueError as error:
        raise UserError(f"{path}: found metadata that are no JSON ({error})") from error
    labels = _unique_texts(path, labels)
    return TrainedModel(str(path), labels, weights, names or (), hierarchy, config)


def _unique_texts(path: str | Path, text: str) -> list[str]:
    try:
        labels = json.loads(text)
    except ValueError:
        labels = None
    is_texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not is_texts or len(set(labels)) != len(labels):
        raise UserError(
            f"{path}: found labels {text[:80]!r} in the metadata, expected a JSON list of texts, "
            "none of them twice"
        )
    return labels
