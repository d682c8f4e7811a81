"""Chooses, by cross-validation, how the scores of a table become precisions.

Of the forms of `curves` the one that predicts the folds best, each from the others; then how far
the curves of single classes may leave that of the model: not at all, or by a shift with a normal
prior, again as predicts the folds best. So a class with few detections keeps the model's curve.

Shape legend: K classes, B bins of scores.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ensemble.calibration import curves
from ensemble.calibration.counting import Counts
from ensemble.calibration.curves import ClassCurves, Curve, shifted

PRIORS = (np.inf, 64.0, 16.0, 4.0, 1.0)


class Fitted(NamedTuple):
    """Calibration of one table.

    Attributes:
      whole: fitted to all folds.
      held: for each fold, fitted to the others.
      prior: of the shifts; infinite for none.
      losses: log loss of a detection in the folds, by form, and with shifts by prior.
      error_before: expected calibration error of the scores themselves.
      error_after: of the folds, each by the curves that were fitted to the others.
    """

    whole: ClassCurves
    held: list[ClassCurves]
    prior: float
    losses: dict[str, float]
    error_before: float
    error_after: float


def fit_table(counts: Counts) -> Fitted:
    """Fits one table by the counts of its detections.

    Of the forms of `curves.FORMS` the first wins where several predict alike.
    """
    num_folds, num_classes, _ = counts.rows.shape
    total = max(counts.rows.sum(), 1.0)
    none = np.zeros(num_classes)
    losses: dict[str, float] = {}
    fitted: dict[str, list[Curve]] = {}
    for form in curves.FORMS:
        fitted[form], loss = [], 0.0
        for fold in range(num_folds):
            rows, hits = counts.without(fold)
            curve = curves.fit_curve(form, counts.scores, rows.sum(axis=0), hits.sum(axis=0))
            fitted[form].append(curve)
            held_rows, held_hits = counts.rows[fold].sum(axis=0), counts.hits[fold].sum(axis=0)
            loss += curves.log_loss(curve(counts.scores), held_rows, held_hits)
        losses[form] = loss / total
    form = min(curves.FORMS, key=lambda name: losses[name])
    best = (losses[form], np.inf, [ClassCurves(curve, none) for curve in fitted[form]])
    for prior in PRIORS[1:] if form != "identity" else ():
        held, loss = [], 0.0
        for fold, curve in enumerate(fitted[form]):
            shifts = _shifts(curve, counts, fold, prior)
            held.append(ClassCurves(curve, shifts))
            p = shifted(curve(counts.scores), shifts[:, None])
            loss += curves.log_loss(p, counts.rows[fold], counts.hits[fold])
        losses[f"shifts, prior {prior:g}"] = loss / total
        if loss / total < best[0]:
            best = (loss / total, prior, held)
    _, prior, held = best
    rows, hits = counts.without(None)
    curve = curves.fit_curve(form, counts.scores, rows.sum(axis=0), hits.sum(axis=0))
    shifts = none if prior == np.inf else _shifts(curve, counts, None, prior)
    promised = np.stack([shifted(c(counts.scores), s[:, None]) for c, s in held]).clip(0, 1)
    return Fitted(
        whole=ClassCurves(curve, shifts),
        held=held,
        prior=prior,
        losses=losses,
        error_before=curves.calibration_error(
            counts.scores.clip(0, 1), rows.sum(axis=0), hits.sum(axis=0)
        ),
        error_after=curves.calibration_error(
            promised.reshape(-1), counts.rows.reshape(-1), counts.hits.reshape(-1)
        ),
    )


def _shifts(
    curve: Curve, counts: Counts, fold: int | None, prior: float
) -> Float[np.ndarray, " K"]:
    rows, hits = counts.without(fold)
    used = np.flatnonzero(rows.any(axis=0))
    logits = curves.logit(curve(counts.scores[used]))
    return curves.fit_offsets(logits, rows[:, used], hits[:, used], prior)
