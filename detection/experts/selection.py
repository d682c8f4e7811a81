"""Expert models (section 5.4): which classes, what to tell them from, and which images.

An expert predicts a few classes that the general models are bad at (C_pos). It is trained on the
images of these classes, and on images of classes that are easily taken for them (C_neg), whose
objects are background to it.

Shape legend: K classes, P of them positive (C_pos), F features of the classifier.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Bool, Float, Int

from common.data.dataset import Dataset
from common.data.model_classes import read_model_classes
from common.io.errors import UserError
from common.tables.hierarchy import ancestors, repeat_with, siblings
from common.tables.ranges import rows_of
from common.training.checkpoint import Checkpoints
from common.training.workdir import read_config
from detection.classifiers.kinds import KINDS

CLASSIFIER = "classifier/kernel"  # end of the path of the class weights
_SLAB = 1 << 15  # images


def lowest_classes(
    aps: Mapping[str, float], labels: Sequence[str], images: Int[np.ndarray, " K"], count: int
) -> Int[np.ndarray, " P"]:
    """Classes with the lowest AP that have training images, fewest images first among equals.

    Args:
      aps: by label.
      labels: of the dataset.
      images: training images with a box of each class, as annotated.
      count: how many classes.

    Raises:
      UserError: fewer classes have an AP and images.
    """
    candidates = [i for i, label in enumerate(labels) if label in aps and images[i]]
    if len(candidates) < count:
        raise UserError(
            f"{len(candidates)} classes have an AP and training images, expected at least {count}"
        )
    ranked = sorted(candidates, key=lambda i: (aps[labels[i]], images[i], i))
    return np.sort(np.array(ranked[:count], np.int64))


def sibling_classes(dataset: Dataset, positive: Int[np.ndarray, " P"]) -> Float[np.ndarray, "P K"]:
    """First view: 1 for children of a common parent in the hierarchy, 0 otherwise."""
    return siblings(dataset.hierarchy, dataset.class_labels)[positive].astype(np.float64)


def confused_classes(
    confusion: Int[np.ndarray, "K K"], positive: Int[np.ndarray, " P"], min_count: int = 2
) -> Float[np.ndarray, "P K"]:
    """Second view: how large a share of a class's matches is with another class.

    Of the detections as class c that lie on an object, the share on objects of k, or of the
    detections on objects of c the share that says k: the larger of the two.

    Args:
      confusion: row annotated, column detected; see `common.metrics.confusion`.
      positive: classes to ask for.
      min_count: pairs that occur less often count as 0.
    """
    detected, annotated = confusion[:, positive].T, confusion[positive]
    shares = [
        np.where(counts >= min_count, counts / np.maximum(counts.sum(1, keepdims=True), 1), 0)
        for counts in (detected, annotated)
    ]
    return np.maximum(*shares)


def cosine_similarity(
    weights: Float[np.ndarray, "K F"], positive: Int[np.ndarray, " P"]
) -> Float[np.ndarray, "P K"]:
    """Third view: cosine of the angle between the classes' weight vectors (paper section 5.4)."""
    weights = np.asarray(weights, np.float64)
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    unit = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0)
    return unit[positive] @ unit.T


def read_classifier(
    path: str | Path, labels: Sequence[str], *, step: int | None = None, name: str = CLASSIFIER
) -> Float[np.ndarray, "K F"]:
    """Class weight vectors of a trained model, without bias and without background.

    Where the model says what its classes are (a work directory, a file of
    scripts.export_weights), each label gets the vector of its own; else they are taken as in order.

    The classifier that inference uses is taken: those of a Decoupling Head's sibling head and of a
    weak head, which only train beside it, do not count unless `name` names them.

    Args:
      path: work directory of a run, or a `.safetensors` file with paths such as
        params/box_head/classifier/kernel.
      labels: (K,) of the dataset; a kernel without labels must have K columns behind those of
        background and object, of which the work directory's config says how many there are (a file:
        one).
      step: checkpoint of the work directory, default the newest.
      name: end of the kernel's path, for models with several classifiers (cascades).

    Raises:
      UserError: nothing readable there, no such kernel, several, one of another shape, or a label
        that the model lacks.
    """
    path, leading = Path(path), 1
    model_labels: Sequence[str] | None = None
    if path.is_dir():
        if (path / "classes.csv").exists():
            model_labels = read_model_classes(path).labels
        if (path / "config.json").exists():
            leading = _leading_columns(read_config(path))
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        checkpoints = Checkpoints(folder)
        params = checkpoints.restore_params(step)[0]["params"]
        checkpoints.close()
        flat = {f"params/{k}": v for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    else:
        try:
            flat = safetensors.numpy.load_file(path)
            with safetensors.safe_open(path, "numpy") as file:
                known = (file.metadata() or {}).get("labels")
            model_labels = None if known is None else json.loads(known)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path}: no readable weights ({error}), expected a work directory or a "
                ".safetensors file"
            ) from error
    kernels = [key for key in flat if key == name or key.endswith("/" + name)]
    for helper in ("sibling/", "weak_head/"):
        if helper not in name:
            kernels = [key for key in kernels if "/" + helper not in key]
    if len(kernels) != 1:
        options = kernels or [key for key, value in flat.items() if np.ndim(value) == 2]
        raise UserError(
            f"{path}: {len(kernels)} arrays are called {name}, expected one (choose by "
            "--classifier); there are "
            f"{', '.join(options[:8]) or 'no matrices'}"
        )
    kernel, whose = np.asarray(flat[kernels[0]]), "dataset" if model_labels is None else "model"
    columns = list(labels if model_labels is None else model_labels)
    if kernel.ndim != 2 or kernel.shape[1] != len(columns) + leading:
        raise UserError(
            f"{path}: {kernels[0]} has shape {kernel.shape}, expected (features, "
            f"{len(columns) + leading}): {leading} of background or object and the {len(columns)} "
            f"classes of the {whose}"
        )
    place = {label: column for column, label in enumerate(columns)}
    if unknown := [label for label in labels if label not in place]:
        raise UserError(
            f"{path}: the model has no class {unknown[0]!r} ({len(unknown)} of the dataset's "
            f"{len(labels)} are missing), expected a model of the dataset's classes"
        )
    return kernel[:, leading:].T[[place[label] for label in labels]].astype(np.float32)


def _leading_columns(config: Mapping[str, Any]) -> int:
    """Columns of a run's classifiers before those of the classes."""
    box_head = config.get("model", {}).get("box_head", {})
    return KINDS[box_head.get("classifier", {}).get("kind", "softmax")].num_leading


def negative_classes(
    dataset: Dataset, positive: Int[np.ndarray, " P"], confusable: Bool[np.ndarray, "P K"]
) -> Bool[np.ndarray, "P K"]:
    """Confusable pairs without C_pos itself and without its relatives."""
    kept = confusable.copy()
    kept[:, positive] = kept[:, relatives(dataset, positive)] = False
    return kept


def relatives(dataset: Dataset, positive: Int[np.ndarray, " P"]) -> Int[np.ndarray, " n"]:
    """Ancestors and descendants of C_pos that are not in it.

    Their objects are objects of a positive class, or may be: never background.
    """
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    family = (parents | parents.T)[positive].any(axis=0)
    family[positive] = False
    return np.flatnonzero(family)


class ExpertImages(NamedTuple):
    """Images of an expert.

    Attributes:
      positive: with a box of C_pos.
      negative: with a box of C_neg and none of C_pos, surely without objects of C_pos.
      dropped: how many further images have a box of C_neg, by the reason why they are not used.
    """

    positive: Int[np.ndarray, " n"]
    negative: Int[np.ndarray, " m"]
    dropped: dict[str, int]


def select_images(
    dataset: Dataset,
    images: Int[np.ndarray, " N"],
    positive: Int[np.ndarray, " P"],
    confusable: Bool[np.ndarray, "P K"],
    *,
    require_verified: bool = False,
) -> ExpertImages:
    """Sorts images into positive and negative ones.

    A negative image may not hold an object of C_pos that has no box. So it is dropped when a class
    of C_pos is present after expansion along the hierarchy (an image-level label, or a box of a
    descendant), and when one is unverified while an ancestor of it is present.

    Args:
      dataset: opened dataset directory.
      images: to choose from.
      positive: C_pos.
      confusable: row: class of C_pos, columns: the C_neg classes confusable with it.
      require_verified: only take negative images in which every C_pos class that is confusable
        with a boxed C_neg class was verified to be absent.
    """
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    exhaustive = bool(dataset.meta.get("exhaustive"))
    negative_class = confusable.any(axis=0)
    chosen_positive, chosen_negative = [], []
    dropped = {"positive class without box": 0, "unverified below a present parent": 0}
    if require_verified:
        dropped["not verified absent"] = 0
    for start in range(0, len(images), _SLAB):
        slab = images[start : start + _SLAB]
        boxed, present, verified = _presence(dataset, slab, parents)
        verified |= exhaustive
        is_positive = boxed[:, positive].any(axis=1)
        candidate = boxed[:, negative_class].any(axis=1) & ~is_positive
        absent = verified[:, positive] & ~present[:, positive]
        reasons = [
            present[:, positive].any(axis=1),
            (~verified[:, positive] & _any(present, parents[positive])).any(axis=1),
        ]
        if require_verified:
            reasons.append((~absent & _any(boxed, confusable)).any(axis=1))
        for name, reason in zip(dropped, reasons, strict=True):
            dropped[name] += int((candidate & reason).sum())
            candidate &= ~reason
        chosen_positive.append(slab[is_positive])
        chosen_negative.append(slab[candidate])
    none = np.zeros(0, np.int64)
    return ExpertImages(
        np.concatenate([none, *chosen_positive]), np.concatenate([none, *chosen_negative]), dropped
    )


def _any(present: Bool[np.ndarray, "I K"], rows: Bool[np.ndarray, "P K"]) -> np.ndarray:
    """(I, P): whether an image has any of the classes that a row marks."""
    return present.astype(np.float32) @ rows.T.astype(np.float32) > 0


def _presence(
    dataset: Dataset, slab: Int[np.ndarray, " I"], parents: Bool[np.ndarray, "K K"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(I, K) each: boxed as annotated; present and verified, expanded along the hierarchy."""
    boxed, present, verified = np.zeros((3, len(slab), len(parents)), bool)
    owner, rows = rows_of(dataset.box_offsets, slab)
    classes = np.asarray(dataset.box_classes[rows], np.int64)
    boxed[owner, classes] = True
    copies, expanded = repeat_with(classes, parents)
    present[owner[copies], expanded] = True
    owner, rows = rows_of(dataset.label_offsets, slab)
    labels = np.asarray(dataset.label_classes[rows], np.int64)
    positive = np.asarray(dataset.label_confidences[rows]) > 0
    copies, expanded = repeat_with(labels[positive], parents)
    present[owner[positive][copies], expanded] = True
    copies, expanded = repeat_with(labels[~positive], parents.T)
    verified[owner[~positive][copies], expanded] = True
    return boxed, present, verified | present


def config_text(base_module: str, base_arg: str | None, fields: Mapping[str, Any], doc: str) -> str:
    """Source of a config file that takes another config and sets some fields.

    Args:
      base_module: such as configs.detection.r50.
      base_arg: argument of its get_config.
      fields: dotted path to value.
      doc: docstring.
    """
    package, _, module = base_module.rpartition(".")
    lines = [f'"""{doc}"""', "", "import ml_collections", "", f"from {package} import {module}"]
    lines += ["", "", "def get_config(arg: str | None = None) -> ml_collections.ConfigDict:"]
    default = "arg" if base_arg is None else f"arg or {base_arg!r}"
    lines += [f"    config = {module}.get_config({default})"]
    lines += [f"    config.{path} = {value!r}" for path, value in fields.items()]
    return "\n".join([*lines, "    return config", ""])
