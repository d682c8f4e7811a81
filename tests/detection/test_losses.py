"""Losses on hand-computed cases."""

import jax
import numpy as np
import pytest

from detection.losses import elementwise


@pytest.mark.parametrize(
    "error, beta, expected",
    [(0.5, 1.0, 0.125), (-3.0, 1.0, 2.5), (0.2, 0.0, 0.2), (1 / 9, 1 / 9, 1 / 18)],
)
def test_smooth_l1(error, beta, expected):
    assert float(elementwise.smooth_l1(np.float32(error), beta)) == pytest.approx(
        expected, rel=1e-5
    )


def test_sigmoid_cross_entropy_is_stable_and_exact():
    logits = np.array([0.0, 2.0, -2.0, 1000.0, -1000.0], np.float32)
    labels = np.array([True, True, False, True, True])
    expected = [np.log(2), np.log1p(np.exp(-2)), np.log1p(np.exp(-2)), 0.0, 1000.0]
    np.testing.assert_allclose(
        elementwise.sigmoid_cross_entropy(logits, labels), expected, rtol=1e-6
    )


def test_softmax_cross_entropy_of_uniform_logits():
    values = elementwise.softmax_cross_entropy(
        np.zeros((3, 501), np.float32), np.array([0, 7, 500])
    )
    np.testing.assert_allclose(values, np.log(501), rtol=1e-6)


def test_share_ignores_infinite_padding_in_value_and_gradient():
    wanted = np.array([True, False, True])
    value, grad = jax.value_and_grad(lambda x: elementwise.share(x, wanted, wanted.sum(), None))(
        np.array([1.0, np.inf, 2.0], np.float32)
    )
    assert value == 1.5
    np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5])


def test_share_of_nothing_is_zero():
    assert elementwise.share(np.ones(3), np.zeros(3, bool), np.array(0), None) == 0
