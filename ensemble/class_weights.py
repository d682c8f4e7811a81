"""What a model's detections of a class are worth: AP re-weighting, experts, weights of models.

The weight of model m for class c is the product of

* its relative validation AP (PFDet): w = AP[m, c] / max over m' of AP[m', c], raised to an exponent
  and not below a floor; 1 where no model has any AP;
* the weight of the model, divided by the largest weight of all.

Hence no weight exceeds 1. An expert's detections of classes outside its list are dropped.

Shape legend: T tables (models), K classes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from ml_collections import ConfigDict

from common.data.class_list import class_name, read_class_list
from common.io.errors import UserError
from common.io.json_file import read_json
from ensemble.inputs import check_known
from ensemble.settings import WeightSettings

# Of detection.evaluate and scripts.score --json, whatever the metric: AP@0.5IOU/LABEL, AP/LABEL.
_CLASS_AP = re.compile(r"(?:.*_)?PerformanceByCategory/AP[^/]*/(.+)")


def class_weights(
    names: Sequence[str], labels: Sequence[str], settings: WeightSettings
) -> Float32[np.ndarray, "T K"]:
    """Weight of each model for each class, in [0, 1].

    Args:
      names: of the models.
      labels: of the classes.
      settings: where the AP comes from and how it counts; models without a metrics file have
        weight 1.

    Raises:
      UserError: unknown models, wrong number of files, an unreadable one, a value out of range.
    """
    weights = np.ones((len(names), len(labels)))
    files = _metrics_files(settings.metrics, names)
    if files:
        aps = np.full(weights.shape, np.nan)
        for model, path in files.items():
            listed = read_class_aps(path)
            if not listed.keys() & set(labels):
                raise UserError(
                    f"{path}: AP of {len(listed)} classes, such as {next(iter(listed))!r}, none of "
                    f"the classes of the tables (such as {labels[0]!r})"
                )
            aps[model] = [listed.get(label, np.nan) for label in labels]
        weights = relative_ap(aps, settings.normalize, settings.exponent, settings.floor)
    return (weights * model_weights(names, settings)[:, None]).astype(np.float32)


def model_weights(names: Sequence[str], settings: WeightSettings) -> Float[np.ndarray, " T"]:
    """Weight of each model, the largest is 1.

    Args:
      names: of the models.
      settings: with the weights of some of them; the others have 1 before the division.

    Raises:
      UserError: unknown models, or a value out of range.
    """
    models = np.ones(len(names))
    for name, text in parse_pairs(settings.models, "config.weights.models").items():
        model = check_known(name, names, "config.weights.models")
        try:
            models[model] = float(text)
        except (TypeError, ValueError):
            models[model] = np.nan
        if not 0 <= models[model] < np.inf:
            raise UserError(
                f"config.weights.models: {name} has weight {text!r}, expected a number, 0 or more"
            )
    if not models.max() > 0:
        raise UserError("config.weights.models: all weights are 0, expected one above")
    return models / models.max()


def relative_ap(
    aps: Float[np.ndarray, "T K"], normalize: str = "max", exponent: float = 1.0, floor: float = 0.0
) -> Float[np.ndarray, "T K"]:
    """PFDet re-weighting (paper sections 4.1 and 5.1).

    Args:
      aps: validation AP, NaN where unknown: such a pair has weight 1.
      normalize: AP over the largest ("max") or the sum ("sum") of the models, or "none".
      exponent: of the relative AP.
      floor: least weight.

    Returns:
      weights in [0, 1]; 1 for classes in which no model has any AP.
    """
    known = np.isfinite(aps)
    values = np.where(known, aps, 0.0)
    best = values.max(axis=0)
    scale = {"max": best, "sum": values.sum(axis=0), "none": np.ones_like(best)}[normalize]
    relative = np.divide(values, scale, out=np.ones_like(values), where=best > 0)
    weights = np.maximum(np.where(best > 0, relative**exponent, 1.0), floor)
    return np.where(known, weights, 1.0)


def kept_classes(
    names: Sequence[str], labels: Sequence[str], experts: Any
) -> Bool[np.ndarray, "T K"]:
    """Classes whose detections a model contributes: all, or those of an expert's list.

    Args:
      names: of the models.
      labels: of the classes.
      experts: `name=file` pairs; see `read_class_list`.

    Raises:
      UserError: an unknown model, an unreadable list, or a class in it that no table can have.
    """
    kept = np.ones((len(names), len(labels)), bool)
    normal = [class_name(label) for label in labels]
    for name, path in parse_pairs(experts, "config.experts").items():
        model = check_known(name, names, "config.experts")
        listed = read_class_list(path)
        for line, label in zip(listed.lines, listed.labels, strict=True):
            if label not in normal:
                raise UserError(
                    f"{path}: line {line}: {label!r} is none of the {len(labels)} classes "
                    f"(such as {labels[0]!r})"
                )
        kept[model] = np.isin(normal, listed.labels)
    return kept


def read_class_aps(path: str) -> dict[str, float]:
    """AP by label from a metrics file; classes without AP (null, or -1 as LVIS has it) left out.

    Raises:
      UserError: no such file, no JSON object, or one without AP per class.
    """
    try:
        values = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: no readable metrics file ({error})") from error
    aps = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        match = _CLASS_AP.fullmatch(name)
        if match and isinstance(value, int | float) and value >= 0:
            if value > 1:
                raise UserError(f"{path}: {name} is {value}, expected an AP in [0, 1]")
            aps[match[1]] = float(value)
    if not aps:
        raise UserError(
            f"{path}: no AP per class, expected a file of detection.evaluate or of "
            "scripts.score --json"
        )
    return aps


def parse_pairs(value: Any, field: str) -> dict[str, Any]:
    """`name=value` pairs, given as text with commas between them or as a mapping."""
    if isinstance(value, Mapping | ConfigDict):
        return dict(value.items())
    pairs = {}
    for text in filter(None, (part.strip() for part in str(value or "").split(","))):
        name, separator, rest = text.partition("=")
        if not separator or not name or not rest:
            raise UserError(f"{field}: found {text!r}, expected name=value,name=value")
        if name in pairs:
            raise UserError(f"{field}: {name!r} is given twice")
        pairs[name] = rest
    return pairs


def _metrics_files(value: Any, names: Sequence[str]) -> dict[int, str]:
    """Metrics file by model."""
    field = "config.weights.metrics"
    if isinstance(value, str):
        texts = [text.strip() for text in value.split(",")] if value else []
        if not any(text.partition("=")[0] in names for text in texts):
            if texts and len(texts) != len(names):
                raise UserError(
                    f"{field}: {len(texts)} files for {len(names)} tables, expected one each in "
                    "the order of the inputs (or name=file for some)"
                )
            return {model: text for model, text in enumerate(texts) if text}
    pairs = parse_pairs(value, field)
    return {check_known(name, names, field): str(path) for name, path in pairs.items()}
