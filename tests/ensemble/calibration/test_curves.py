"""Curves from scores to precisions: monotone, right where the truth is known."""

import numpy as np
import pytest

from ensemble.calibration import curves


def binned(scores, right):
    """Mean scores, rows and hits of the bins."""
    bins = curves.bins_of(scores)
    rows = np.bincount(bins, minlength=curves.NUM_BINS).astype(float)
    hits = np.bincount(bins, right, curves.NUM_BINS)
    return np.bincount(bins, scores, curves.NUM_BINS) / np.maximum(rows, 1), rows, hits


def draw(precision, count=40_000, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.beta(0.7, 1.5, count)
    return binned(scores, (rng.random(count) < precision(scores)).astype(float))


PRECISIONS = {
    "temperature": lambda s: s**2 / (s**2 + (1 - s) ** 2),
    "beta": lambda s: curves.expit(0.5 * np.log(s) - 1.5 * np.log1p(-s) - 1),
    "isotonic": lambda s: np.where(s < 0.4, 0.1, 0.5 + 0.4 * s),
}


@pytest.mark.parametrize("form", PRECISIONS)
def test_each_form_finds_its_kind_of_curve(form):
    curve = curves.fit_curve(form, *draw(PRECISIONS[form]))
    at = np.array([0.02, 0.1, 0.2, 0.5, 0.7, 0.9])  # lines lead from one pool to the next
    np.testing.assert_allclose(curve(at), PRECISIONS[form](at), atol=0.05)


@pytest.mark.parametrize("form", curves.FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_curves_rise_strictly_from_0_to_1(form, seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(200) ** 2
    curve = curves.fit_curve(form, *binned(scores, (rng.random(200) < 0.3).astype(float)))
    grid = np.linspace(0, 1, 5001)
    values = curve(grid)
    assert (np.diff(values) > 0).all() and values[0] >= 0 and values[-1] <= 1
    # Scores of tables may be a little above 1.
    assert curve(np.array([1.2]))[0] >= values[-1]


def test_isotonic_is_the_best_rising_fit():
    """Pools equal brute force: max over starts of the min over stops of the means."""
    scores, rows, hits = draw(lambda s: 0.3 + 0.2 * np.sin(9 * s), count=300)
    used = np.flatnonzero(rows)
    curve = curves.fit_curve("isotonic", scores, rows, hits)
    n, k = rows[used].copy(), hits[used].copy()
    for end in (0, -1):
        n[end], k[end] = n[end] + 1, k[end] + hits.sum() / rows.sum()
    pools = [
        max(
            min(k[a : b + 1].sum() / n[a : b + 1].sum() for b in range(i, len(n)))
            for a in range(i + 1)
        )
        for i in range(len(n))
    ]
    np.testing.assert_allclose(curve.precisions, np.unique(np.round(pools, 12)), atol=1e-9)


def test_identity_is_exact():
    scores = np.random.default_rng(0).random(1000).astype(np.float32) * np.float32(1.2)
    assert (curves.IDENTITY(scores).astype(np.float32) == scores).all()
    precisions = np.random.default_rng(1).random(1000)
    assert (curves.shifted(precisions, np.zeros(1000)) == precisions).all()


def test_a_class_moves_as_far_as_its_detections_prove():
    logits = curves.logit(np.array([0.1, 0.3, 0.6]))
    rows = np.array([[4e4, 4e4, 4e4], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    hits = rows * curves.expit(logits + 1.0)
    many, few, none = curves.fit_offsets(logits, rows, hits, prior=4.0)
    assert abs(many - 1) < 0.01 and 0.05 < few < 0.5 and none == 0
    rising = curves.shifted(np.linspace(0, 1, 101), np.full(101, -2.0))
    assert (np.diff(rising) > 0).all() and rising[0] == 0 and rising[-1] == 1


def test_logistic_weights_are_where_the_gradient_vanishes():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 2, (300, 3)), np.ones((300, 1))], axis=1)
    rows = rng.random(300) * 3
    hits = rows * rng.random(300)
    ridge = np.array([1.0, 1.0, 1.0, 0.0])
    weights = curves.fit_logistic(x, rows, hits, ridge)
    gradient = x.T @ (rows * curves.expit(x @ weights) - hits) + ridge * weights
    assert np.abs(gradient).max() < 1e-4


def test_calibration_error_by_hand():
    precisions, rows = np.array([0.1, 0.12, 0.9]), np.array([10.0, 10.0, 20.0])
    hits = np.array([1.0, 3.0, 10.0])
    # |1 + 1.2 - 4| and |18 - 10| of 40
    assert curves.calibration_error(precisions, rows, hits) == pytest.approx((1.8 + 8) / 40)
