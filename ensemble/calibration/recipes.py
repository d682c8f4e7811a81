"""Searches how calibrated tables are merged; every table alone is a recipe too.

First each table alone, with and without the second opinion; then all tables, with each operator;
then the best of these is changed, one thing at a time (a table less, only the best tables of each
class, another operator, the opinion), as long as that helps. All are scored on images whose scores
come from other folds. At last the best recipe must also reach, on the mean of the folds one by one,
the best table alone; otherwise the next best is taken, in the end that table.

Shape legend: F folds, T tables, K classes, B bins of scores.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ensemble.calibration.calibration import Recipe
from ensemble.calibration.counting import Counts

ALONE: dict[str, Any] = {"name": "nms", "iou_threshold": 1.0}  # drops nothing
OPERATORS: tuple[dict[str, Any], ...] = (
    {"name": "nms", "iou_threshold": 0.5},
    {"name": "nms", "iou_threshold": 0.65},
    {"name": "adj_nms", "iou_threshold": 0.5},
    {"name": "soft_nms", "min_score": 0.0},
    {"name": "voting", "iou_threshold": 0.6},
    {"name": "wbf", "iou_threshold": 0.55, "conf_type": "max"},
    {"name": "wbf", "iou_threshold": 0.65, "conf_type": "max"},
    {"name": "wbf", "iou_threshold": 0.55, "conf_type": "absent_model_aware_avg"},
    {"name": "nmw", "iou_threshold": 0.6},
)
_PRIOR_BOXES = 10.0  # of a class: its rank is drawn towards that of its table
_CHECKED = 8  # recipes that are scored fold by fold, the best tables alone beside


class Tried(NamedTuple):
    """A recipe and its figure on the folds together."""

    recipe: Recipe
    score: float


class Choice(NamedTuple):
    """What was tried, best first, and what is taken.

    Attributes:
      tried: all recipes.
      best: that is taken.
      single: best table alone with its own scores.
      folds: mean of the figures of the folds one by one, of `best` and of `single`.
      opinion: whether the second opinion makes the best ensemble of all tables better.
    """

    tried: list[Tried]
    best: Tried
    single: Tried
    folds: tuple[float, float]
    opinion: bool


def choose(
    names: Sequence[str],
    score: Callable[[Recipe], float],
    score_fold: Callable[[Recipe, int], float],
    num_folds: int,
    say: Callable[[str], None],
) -> Choice:
    """Searches the recipes.

    Args:
      names: of the tables.
      score: figure of a recipe on the folds together.
      score_fold: on one fold.
      num_folds: of them.
      say: where each new best goes.
    """
    known: dict[str, Tried] = {}

    def attempt(recipe: Recipe) -> Tried:
        key = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
        if key not in known:
            before = max((tried.score for tried in known.values()), default=-1.0)
            known[key] = Tried(recipe, score(recipe))
            if known[key].score > before:
                say(f"{known[key].score:.4f}  {describe(recipe)}")
        return known[key]

    singles = [attempt(Recipe((name,), 0, False, ALONE)) for name in names]
    for name in names if len(names) > 1 else ():
        attempt(Recipe((name,), 0, True, ALONE))
    whole = {False: [0.0], True: [0.0]}
    for operator in OPERATORS if len(names) > 1 else ():
        for opinion, scores in whole.items():
            scores.append(attempt(Recipe(tuple(names), 0, opinion, operator)).score)
    wins = max(whole[True]) > max(whole[False])
    while True:
        best = max(known.values(), key=lambda tried: tried.score)
        changed = [attempt(recipe) for recipe in neighbours(best.recipe)]
        if not any(tried.score > best.score for tried in changed):
            break
    single = max(singles, key=lambda tried: tried.score)

    def mean(recipe: Recipe) -> float:
        return float(np.mean([score_fold(recipe, fold) for fold in range(num_folds)]))

    tried = sorted(known.values(), key=lambda tried: -tried.score)
    of_single = mean(single.recipe)
    for candidate in tried[:_CHECKED]:
        if candidate.score < single.score or candidate == single:
            break
        of_folds = mean(candidate.recipe)
        if of_folds >= of_single:
            return Choice(tried, candidate, single, (of_folds, of_single), wins)
    return Choice(tried, single, single, (of_single, of_single), wins)


def neighbours(recipe: Recipe) -> list[Recipe]:
    """Recipes that differ in one thing."""
    if len(recipe.models) < 2:
        return []
    changes: list[dict[str, Any]] = [
        {"models": tuple(m for m in recipe.models if m != name)} for name in recipe.models
    ]
    changes += [{"best": best} for best in range(len(recipe.models)) if best != recipe.best]
    changes += [{"operator": operator} for operator in OPERATORS if operator != recipe.operator]
    changes.append({"opinion": not recipe.opinion})
    found = [dataclasses.replace(recipe, **change) for change in changes]
    # One table is merged with nothing, and is the best of one.
    return [
        dataclasses.replace(r, best=0, operator=ALONE)
        if len(r.models) == 1
        else dataclasses.replace(r, best=r.best if r.best < len(r.models) else 0)
        for r in found
    ]


def describe(recipe: Recipe) -> str:
    """A recipe in words."""
    fields = ", ".join(f"{k}={v}" for k, v in recipe.operator.items() if k != "name")
    parts = [" + ".join(recipe.models)]
    if len(recipe.models) > 1:
        parts.append(f"{recipe.operator['name']}({fields})")
    if recipe.best:
        parts.append(f"best {recipe.best} of each class")
    if recipe.opinion:
        parts.append("second opinion")
    return ", ".join(parts)


def class_ranks(
    counts: Sequence[Counts], truth: Float[np.ndarray, "F K"], fold: int | None
) -> Float[np.ndarray, "T K"]:
    """AP of each table in each class by the folds but one, drawn towards its mean.

    In a class of n objects its own AP weighs n, and what is expected of it (the mean of the tables
    there, times how much better than they the table is in general) `_PRIOR_BOXES`.

    Args:
      counts: of each table.
      truth: objects to find, by fold and class.
      fold: that is left out; None: none.
    """
    objects = truth.sum(axis=0) - (0 if fold is None else truth[fold])
    aps = np.stack([binned_ap(*table.without(fold), objects) for table in counts])
    known = objects > 0
    if not known.any():
        return np.zeros_like(aps)
    of_table = aps[:, known].mean(axis=1, keepdims=True)
    of_class = np.where(known, aps.mean(axis=0), of_table.mean())
    expected = of_class * of_table / max(float(of_table.mean()), 1e-9)
    return (objects * aps + _PRIOR_BOXES * expected) / (objects + _PRIOR_BOXES)


def binned_ap(
    rows: Float[np.ndarray, "K B"], hits: Float[np.ndarray, "K B"], objects: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """AP of each class from counts in bins of scores; 0 where there is nothing to find."""
    found = np.cumsum(hits[:, ::-1], axis=1)
    precision = found / np.maximum(np.cumsum(rows[:, ::-1], axis=1), 1e-9)
    ceiling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (hits[:, ::-1] * ceiling).sum(axis=1)
    return np.divide(area, objects, out=np.zeros(len(rows)), where=objects > 0)
