"""A calibration as `ensemble.calibrate` writes it and `ensemble.merge` applies it.

    {"kind": "ensemble calibration", "format": 1, "metric": "coco", "labels": ["cat", ...],
     "models": {"a": {"form": "beta", "scores": [...], "precisions": [...],
                      "shifts": {"cat": 0.3, ...}, "ranks": {"cat": 0.41, ...}}, ...},
     "opinion": [[...], ...] or null,
     "recipe": {"models": ["a", "b"], "best": 2, "opinion": true, "operator": {"name": "nms"}},
     "notes": {...}}

`scores` and `precisions` are the knots of a model's curve (`curves`), `shifts` what a class adds in
logits, `ranks` the AP by which the best models of a class are chosen. `opinion` has the weights of
each model in the order of `models` (`opinion`). `recipe` is the ensemble that was best on the
folds; it is used where the config says so. `notes` are not read.

Shape legend: T tables, K classes, n rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from common.io.atomic import write_json
from common.io.errors import UserError
from common.io.json_file import read_json
from common.io.paths import PathLike
from ensemble.calibration import curves
from ensemble.calibration.curves import ClassCurves, Curve, shifted
from ensemble.calibration.opinion import Opinion, check_weights

KIND, FORMAT = "ensemble calibration", 1
RECIPE = "recipe"  # name of the operator that stands for the recipe of a calibration


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How calibrated tables are merged.

    Attributes:
      models: that take part.
      best: of each class, as many models of the highest rank contribute; 0: all.
      opinion: whether the second opinion changes the scores.
      operator: config section of `ensemble.operators.make_operator`.
    """

    models: tuple[str, ...]
    best: int
    opinion: bool
    operator: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Curves of the tables of an ensemble, in its order of tables and classes.

    Attributes:
      names: of the tables.
      labels: of the classes.
      curves: of each table.
      ranks: AP of each table in each class on the split, drawn towards its mean.
      opinion: None without one.
      recipe: what was best on the folds.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    curves: Sequence[ClassCurves]
    ranks: Float[np.ndarray, "T K"]
    opinion: Opinion | None
    recipe: Recipe

    def precisions(
        self,
        models: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        scores: Float32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, " n"]:
        """Calibrated scores of rows; `models` do not fall."""
        return apply_curves(self.curves, models, labels, scores)

    def kept(self) -> Bool[np.ndarray, "T K"]:
        """Classes that each table contributes by the recipe."""
        member = np.array([name in self.recipe.models for name in self.names])
        return best_models(self.ranks, member, self.recipe.best)

    def arranged(
        self, names: Sequence[str], labels: Sequence[str], path: PathLike
    ) -> "Calibration":
        """The same in another order of tables and classes; classes it does not know get no shift.

        Raises:
          UserError: a table that it does not know, or an opinion of other tables.
        """
        known = list(self.names)
        for name in names:
            if name not in known:
                raise UserError(
                    f"{path}: calibrates {', '.join(known)}, not {name!r} (names are given as "
                    "name=path in --inputs)"
                )
        order = [known.index(name) for name in names]
        place = {label: code for code, label in enumerate(self.labels)}
        column = np.array([place.get(label, len(place)) for label in labels], np.int64)
        unknown = np.zeros((len(known), 1))
        shifts = np.concatenate([np.stack([c.shifts for c in self.curves]), unknown], axis=1)
        ranks = np.concatenate([self.ranks, unknown], axis=1)
        opinion = self.opinion
        if opinion is not None and order != list(range(len(known))):
            opinion = None if len(order) < len(known) else opinion.arranged(order)
        return Calibration(
            names=tuple(names),
            labels=tuple(labels),
            curves=[ClassCurves(self.curves[i].curve, shifts[i, column]) for i in order],
            ranks=ranks[order][:, column],
            opinion=opinion,
            recipe=self.recipe,
        )


def apply_curves(
    fitted: Sequence[ClassCurves],
    models: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
) -> Float32[np.ndarray, " n"]:
    """Calibrated scores of rows; `models` do not fall."""
    calibrated = np.array(scores, np.float32)
    bounds = np.searchsorted(models, np.arange(len(fitted) + 1))
    for (curve, shifts), first, stop in zip(fitted, bounds[:-1], bounds[1:], strict=True):
        values = curve(scores[first:stop])
        calibrated[first:stop] = shifted(values, shifts[labels[first:stop]])
    return calibrated


def best_models(
    ranks: Float[np.ndarray, "T K"], member: Bool[np.ndarray, " T"], best: int
) -> Bool[np.ndarray, "T K"]:
    """Which models contribute to a class: the `best` members of the highest rank, 0: all."""
    kept = np.repeat(member[:, None], ranks.shape[1], axis=1)
    if best:
        order = np.argsort(-np.where(kept, ranks, -1.0), axis=0, kind="stable")
        place = np.argsort(order, axis=0, kind="stable")
        kept &= place < best
    return kept


def save(path: PathLike, calibration: Calibration, metric: str, notes: Mapping[str, Any]) -> None:
    """Writes the JSON file, which is seen whole or not at all."""
    models = {}
    for name, (curve, shifts), ranks in zip(
        calibration.names, calibration.curves, calibration.ranks, strict=True
    ):
        of_labels = list(zip(calibration.labels, shifts.tolist(), ranks.tolist(), strict=True))
        models[name] = {
            "form": curve.form,
            "scores": curve.scores.tolist(),
            "precisions": curve.precisions.tolist(),
            "shifts": {label: shift for label, shift, _ in of_labels if shift},
            "ranks": {label: round(rank, 6) for label, _, rank in of_labels if rank},
        }
    opinion = calibration.opinion
    content = {
        "kind": KIND,
        "format": FORMAT,
        "metric": metric,
        "labels": list(calibration.labels),
        "models": models,
        "opinion": None if opinion is None else opinion.weights.tolist(),
        "recipe": dataclasses.asdict(calibration.recipe),
        "notes": dict(notes),
    }
    write_json(path, content)


def load(path: PathLike) -> Calibration:
    """Reads and checks a calibration.

    Raises:
      UserError: no such file, no JSON, another format, or a wrong field; the text names it.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the calibration ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f'{path}: no calibration, expected a JSON object with "kind": "{KIND}"')
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: field format is {content.get('format')!r}, this code reads {FORMAT}"
        )
    where = "labels"
    try:
        labels = tuple(_text(label) for label in content["labels"])
        fitted, ranks = [], []
        for name, model in content["models"].items():
            where = f"models.{name}"
            fitted.append(ClassCurves(_curve(model), _by_label(model["shifts"], labels)))
            ranks.append(_by_label(model["ranks"], labels))
        names = tuple(content["models"])
        where = "opinion"
        weights = content["opinion"]
        opinion = None if weights is None else Opinion(check_weights(weights))
        if opinion is not None and len(opinion.weights) != len(names):
            raise ValueError(f"weights of {len(opinion.weights)} models")
        where = "recipe"
        recipe = _recipe(content["recipe"], names)
        if recipe.opinion and opinion is None:
            raise ValueError("asks for an opinion, there is none")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {where}: {type(error).__name__} {error}") from error
    if not names:
        raise UserError(f"{path}: models: none, expected one or more")
    return Calibration(names, labels, fitted, np.stack(ranks), opinion, recipe)


def _curve(model: Mapping[str, Any]) -> Curve:
    scores, precisions = (np.array(model[key], np.float64) for key in ("scores", "precisions"))
    if model["form"] not in curves.FORMS:
        raise ValueError(f"form {model['form']!r}, expected one of {', '.join(curves.FORMS)}")
    if scores.shape != precisions.shape or scores.ndim != 1:
        raise ValueError("scores and precisions are not lists of one length")
    if (len(scores) == 0) != (model["form"] == "identity"):
        raise ValueError(f"{len(scores)} scores of form {model['form']}")
    for key, values in (("scores", scores), ("precisions", precisions)):
        inside = np.isfinite(values).all() and (values >= 0).all() and (values <= 1.5).all()
        if not inside or (np.diff(values) < 0).any():
            raise ValueError(f"{key} do not rise from 0 to 1")
    return Curve(model["form"], scores, precisions)


def _by_label(values: Mapping[str, Any], labels: Sequence[str]) -> Float[np.ndarray, " K"]:
    unknown = values.keys() - set(labels)
    if unknown:
        raise ValueError(f"{min(unknown)!r} is none of the labels")
    array = np.array([float(values.get(label, 0.0)) for label in labels])
    if not (np.abs(array) <= 100).all():
        raise ValueError("a value beyond 100")
    return array


def _recipe(content: Mapping[str, Any], names: Sequence[str]) -> Recipe:
    models = tuple(_text(name) for name in content["models"])
    if not models or not set(models) <= set(names):
        raise ValueError(f"models {', '.join(models)}, expected some of {', '.join(names)}")
    best, opinion = content["best"], content["opinion"]
    if not isinstance(best, int) or best < 0 or not isinstance(opinion, bool):
        raise ValueError(f"best {best!r}, opinion {opinion!r}")
    return Recipe(models, best, opinion, dict(content["operator"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
