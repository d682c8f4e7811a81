"""Losses on hand-computed cases."""

import jax
import numpy as np
import pytest

from common.io.errors import UserError
from common.io.settings import read_settings
from configs.detection import r50, r50_cascade
from detection.losses.box import smooth_l1
from detection.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy
from detection.losses.shares import share
from detection.losses.weights import Term, weighted
from detection.models.settings import LossWeights, ModelSettings


@pytest.mark.parametrize(
    "error, beta, expected",
    [(0.5, 1.0, 0.125), (-3.0, 1.0, 2.5), (0.2, 0.0, 0.2), (1 / 9, 1 / 9, 1 / 18)],
)
def test_smooth_l1(error, beta, expected):
    assert float(smooth_l1(np.float32(error), beta)) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_cross_entropy_is_stable_and_exact():
    logits = np.array([0.0, 2.0, -2.0, 1000.0, -1000.0], np.float32)
    labels = np.array([True, True, False, True, True])
    expected = [np.log(2), np.log1p(np.exp(-2)), np.log1p(np.exp(-2)), 0.0, 1000.0]
    np.testing.assert_allclose(sigmoid_cross_entropy(logits, labels), expected, rtol=1e-6)


def test_softmax_cross_entropy_of_uniform_logits():
    values = softmax_cross_entropy(np.zeros((3, 501), np.float32), np.array([0, 7, 500]))
    np.testing.assert_allclose(values, np.log(501), rtol=1e-6)


def test_share_ignores_infinite_padding_in_value_and_gradient():
    wanted = np.array([True, False, True])
    value, grad = jax.value_and_grad(lambda x: share(x, wanted, wanted.sum(), None))(
        np.array([1.0, np.inf, 2.0], np.float32)
    )
    assert value == 1.5
    np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5])


def test_share_of_nothing_is_zero():
    assert share(np.ones(3), np.zeros(3, bool), np.array(0), None) == 0


def test_weights_of_kind_stage_and_branch_are_multiplied():
    config = r50_cascade.get_config().model
    config.loss_weights.update(box_class=3.0, rpn_box=2.0)
    config.stages.loss_weights = (0.5, 0.25, 1.0)
    settings = read_settings(ModelSettings, config)
    terms = {Term("rpn_box"): 1.0}
    for branch in (0, 1):
        for stage in (0, 1):
            terms |= {Term(name, branch, stage): 1.0 for name in ("box_class", "box_regression")}
    assert weighted(terms, settings) == {
        "rpn_box": 2.0,
        "box_class_1_stage1": 1.5,  # the first branch serves classes
        "box_regression_1_stage1": 0.5 * 0.25,
        "box_class_1_stage2": 0.75,
        "box_regression_1_stage2": 0.25 * 0.25,
        "box_class_2_stage1": 1.5 * 0.25,
        "box_regression_2_stage1": 0.5,
        "box_class_2_stage2": 0.75 * 0.25,
        "box_regression_2_stage2": 0.25,
    }
    one_stage = read_settings(ModelSettings, r50.get_config().model)
    assert weighted({Term("box_class", None, 0): 1.0}, one_stage) == {"box_class": 1.0}


def test_weights_of_unknown_losses_are_refused():
    weights = dict(r50.get_config().model.loss_weights) | {"box_clas": 2.0}
    with pytest.raises(
        UserError, match=r"loss_weights.box_clas: no such field; did you mean box_class"
    ):
        read_settings(LossWeights, weights, "config.model.loss_weights")
