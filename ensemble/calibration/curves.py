"""Score -> precision: monotone curves fitted to counts of detections in bins of their scores.

Bins are as wide as `STEP` in the logit of the score, so that scores near 0 and near 1 are told
apart alike. A curve is a list of knots with straight lines between them. It rises strictly: all
forms are mixed with a little of the score itself, so that no ranking within a class is lost.

    identity     the score
    temperature  logit p = a logit s                          (Guo et al. 2017)
    beta         logit p = a log s - b log(1 - s) + c, a, b >= 0  (Kull et al. 2017)
    isotonic     pooled adjacent violators, lines between the means of the pools

Shape legend: B bins, n scores, f features, k knots, K classes.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression

Form = Literal["identity", "temperature", "beta", "isotonic"]
FORMS: tuple[str, ...] = get_args(Form)
STEP, LIMIT = 0.05, 9.2  # in logits; scores beyond count as those at the limit
NUM_BINS = int(round(2 * LIMIT / STEP)) + 1
_SCORE_SHARE = 1e-3  # of the score in every curve
_KNOT_BINS = 4  # bins between the knots of temperature and beta
_TINY = 1e-7
_NEWTON_STEPS = 25
_GROUPS = 15  # of the expected calibration error


class Curve(NamedTuple):
    """Knots of a curve, both rising strictly; before the first and after the last: straight on to
    (0, 0) and (1, 1)."""

    form: str
    scores: Float[np.ndarray, " k"]
    precisions: Float[np.ndarray, " k"]

    def __call__(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Precision at each score, float64; identity gives the scores bit for bit."""
        if self.form == "identity":
            return np.asarray(scores, np.float64)
        knots = np.concatenate([[0.0], self.scores, [max(1.0, self.scores[-1] * (1 + 1e-6))]])
        values = np.concatenate([[0.0], self.precisions, [self.precisions[-1]]])
        inside = np.clip(scores, 0.0, 1.0)
        return (1 - _SCORE_SHARE) * np.interp(inside, knots, values) + _SCORE_SHARE * inside


class ClassCurves(NamedTuple):
    """Curve of a model, and the shift of each class in logits."""

    curve: Curve
    shifts: Float[np.ndarray, " K"]


IDENTITY = Curve("identity", np.zeros(0), np.zeros(0))


def shifted(
    precisions: Float[np.ndarray, "*n"], shifts: Float[np.ndarray, "*n"]
) -> Float[np.ndarray, "*n"]:
    """Precisions whose odds are multiplied by exp(shift): exactly as they were for a shift of 0."""
    factors = np.exp(shifts)
    moved = precisions * factors / (1 + precisions * (factors - 1))
    return np.where(shifts == 0, precisions, moved)


def bins_of(scores: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Bin of each score."""
    inside = np.clip(np.asarray(scores, np.float64), 1e-12, 1 - 1e-12)
    position = (np.log(inside) - np.log1p(-inside) + LIMIT) / STEP
    return np.clip(np.round(position), 0, NUM_BINS - 1).astype(np.int64)


def fit_curve(
    form: str,
    scores: Float[np.ndarray, " B"],
    rows: Float[np.ndarray, " B"],
    hits: Float[np.ndarray, " B"],
) -> Curve:
    """Fits a form to counts.

    Args:
      form: one of FORMS.
      scores: mean score of each bin.
      rows: detections in each bin.
      hits: what is right of them, at most as many.
    """
    used = rows > 0
    scores, rows, hits = (np.asarray(a, np.float64)[used] for a in (scores, rows, hits))
    if form == "identity" or not len(scores):
        return IDENTITY
    if form == "isotonic":
        return _isotonic(scores, rows, hits)
    inside = np.clip(scores, _TINY, 1 - _TINY)
    low, high = np.log(inside), -np.log1p(-inside)
    if form == "temperature":
        weights = [max(fit_logistic((low + high)[:, None], rows, hits)[0], _TINY)] * 2 + [0.0]
    else:
        one = np.ones(len(scores))
        a, b, c = fit_logistic(np.stack([low, high, one], axis=1), rows, hits, ridge=1e-3)
        if a <= 0:
            a, (b, c) = 0.0, fit_logistic(np.stack([high, one], axis=1), rows, hits, ridge=1e-3)
        elif b <= 0:
            b, (a, c) = 0.0, fit_logistic(np.stack([low, one], axis=1), rows, hits, ridge=1e-3)
        weights = [max(a, 0.0), max(b, 0.0), c]
    position = np.arange(0, NUM_BINS, _KNOT_BINS) * STEP - LIMIT
    knots = expit(position)
    low, high = np.log(knots), -np.log1p(-knots)
    return Curve(form, knots, expit(weights[0] * low + weights[1] * high + weights[2]))


def _isotonic(
    scores: Float[np.ndarray, " B"], rows: Float[np.ndarray, " B"], hits: Float[np.ndarray, " B"]
) -> Curve:
    prior = hits.sum() / rows.sum()
    # One detection of average precision in the first and last bin: no pool is sure of itself.
    rows, hits = rows.copy(), hits.copy()
    for end in (0, -1):
        rows[end] += 1
        hits[end] += prior
    found = isotonic_regression(hits / rows, weights=rows)
    starts = found.blocks[:-1].astype(np.int64)
    masses = np.add.reduceat(rows, starts)
    centres = np.add.reduceat(rows * scores, starts) / masses
    values = found.x[starts]
    rising = np.concatenate([[True], np.diff(centres) > 0])
    return Curve("isotonic", centres[rising], values[rising])


def fit_logistic(
    features: Float[np.ndarray, "n f"],
    rows: Float[np.ndarray, " n"],
    hits: Float[np.ndarray, " n"],
    ridge: float | Float[np.ndarray, " f"] = 0.0,
) -> Float[np.ndarray, " f"]:
    """Weights w of largest likelihood of hits out of rows where logit p = features @ w.

    Args:
      features: with a column of ones for a constant.
      rows: weight of each line.
      hits: in [0, rows].
      ridge: of the squared weights.
    """
    size = features.shape[1]
    weights, penalty = np.zeros(size), np.broadcast_to(ridge, size)
    loss = np.inf
    step = np.zeros(size)
    for _ in range(_NEWTON_STEPS):
        z = features @ weights
        new_loss = float(np.sum(rows * np.logaddexp(0, z) - hits * z))
        new_loss += 0.5 * float(penalty @ weights**2)
        if not new_loss <= loss + 1e-9 * abs(loss):  # too far: half the way back
            step /= 2
            weights = weights + step
            continue
        if loss - new_loss < 1e-9 * abs(new_loss):
            break
        loss, p = new_loss, expit(z)
        gradient = features.T @ (rows * p - hits) + penalty * weights
        hessian = (features * (rows * p * (1 - p))[:, None]).T @ features
        hessian += np.diag(penalty + 1e-9 * (1 + np.trace(hessian) / size))
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
    return weights


def fit_offsets(
    logits: Float[np.ndarray, " B"],
    rows: Float[np.ndarray, "K B"],
    hits: Float[np.ndarray, "K B"],
    prior: float,
) -> Float[np.ndarray, " K"]:
    """Shift of a model's curve, in logits, for each class.

    Args:
      logits: of the model's curve at the bins.
      rows: detections of each class and bin.
      hits: what is right of them.
      prior: precision of the normal prior around no shift: evidence that a class must bring along
        (a detection of precision p brings p (1 - p)).
    """
    shift = np.zeros(len(rows))
    for _ in range(10):
        p = expit(logits + shift[:, None])
        gradient = (hits - rows * p).sum(axis=1) - prior * shift
        step = gradient / ((rows * p * (1 - p)).sum(axis=1) + prior)
        shift = np.clip(shift + np.clip(step, -1.5, 1.5), -6, 6)
    return shift


def log_loss(
    precisions: Float[np.ndarray, "*b"],
    rows: Float[np.ndarray, "*b"],
    hits: Float[np.ndarray, "*b"],
) -> float:
    """Negative log likelihood of hits out of rows, summed."""
    p = np.clip(precisions, _TINY, 1 - _TINY)
    return -float(np.sum(hits * np.log(p) + (rows - hits) * np.log1p(-p)))


def calibration_error(
    precisions: Float[np.ndarray, " B"],
    rows: Float[np.ndarray, " B"],
    hits: Float[np.ndarray, " B"],
) -> float:
    """Expected calibration error: |promised - found| precision, over groups of equal width."""
    group = np.minimum((np.asarray(precisions) * _GROUPS).astype(np.int64), _GROUPS - 1)
    promised = np.bincount(group, precisions * rows, _GROUPS)
    found = np.bincount(group, hits, _GROUPS)
    return float(np.abs(promised - found).sum() / max(rows.sum(), _TINY))


def expit(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def logit(p: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Inverse of `expit`, of values held within (0, 1)."""
    p = np.clip(p, _TINY, 1 - _TINY)
    return np.log(p) - np.log1p(-p)
