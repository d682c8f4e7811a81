"""Box heads regress only the boxes that are trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry.deform_roi import deform_roi_align
from common.geometry.roi_align import roi_align
from detection.classifiers.softmax import Softmax
from detection.losses.roi_class import ClassLosses
from detection.models import second_stage
from detection.models.box_head import RegressorHead, TwoFCHead
from detection.models.decoupling_head import DecouplingHead
from detection.settings import read_run
from detection.structures import RoITargets
from tests import tiny

FEATURES = [jax.random.normal(jax.random.key(i), (2, 16 >> i, 16 >> i, 8)) for i in range(2)]
HEADS = {
    "two_fc": TwoFCHead(Softmax(3), width=16),
    "decoupling": DecouplingHead(Softmax(3), width=16, offset_width=8),
    "regressor": RegressorHead(width=16),
}


def pool(boxes, offsets=None):
    if offsets is None:
        return roi_align(FEATURES, boxes, (4, 8), output_size=7)
    return deform_roi_align(FEATURES, boxes, offsets, (4, 8), output_size=7)


def targets_of(num_positives):
    """Eight regions of two images, positive ones first."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 30, (2, 8, 2))
    boxes = np.concatenate([low, low + rng.uniform(8, 30, low.shape)], -1).astype(np.float32)
    gt_boxes = boxes + rng.uniform(-3, 3, boxes.shape).astype(np.float32)
    positive = np.arange(8) < np.array(num_positives)[:, None]
    labels = np.where(positive, rng.integers(1, 4, (2, 8)), 0)
    valid, is_gt = np.arange(8) < [[8], [7]], np.zeros((2, 8), bool)
    return RoITargets(boxes, labels, gt_boxes, valid, is_gt, np.zeros((2, 8), np.int32))


@pytest.mark.parametrize("normaliser", ["sampled", "positive"])
@pytest.mark.parametrize("kind", HEADS)
def test_boxes_of_background_change_no_loss_and_no_gradient(kind, normaliser):
    head, targets = HEADS[kind], targets_of([2, 1])
    config = tiny.get_config()
    config.model.box_head.loss.normaliser = normaliser
    model = read_run(config).model
    params = jax.jit(lambda key: head.init(key, pool, targets.boxes, True))(jax.random.key(1))

    @jax.jit
    def losses_and_gradient(params):
        def losses(params, num_regressed):
            output = head.apply(params, pool, targets.boxes, True, num_regressed)
            valid, classes = jnp.ones(2, bool), None
            if kind != "regressor":
                keys = jax.random.split(jax.random.key(0), 2)
                losses = ClassLosses(Softmax(3), keys[0], {})
                classes = losses.of_stage(0, 1, targets, {"image_valid": valid}, keys, None)
            terms = second_stage.head_losses(
                output, targets, valid, model.stages.each[0], model.box_head, None, classes
            )
            return sum(terms.values()), (terms, output)

        grad = jax.grad(losses, has_aux=True)
        return grad(params, None), grad(params, 2)

    everything, first = losses_and_gradient(params)
    assert everything[1][1].deltas.shape[1] == 8 and first[1][1].deltas.shape[1] == 2
    for expected, found in zip(
        jax.tree.leaves((everything[0], everything[1][0])),
        jax.tree.leaves((first[0], first[1][0])),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(first[0]["params"]["regressor"]["kernel"]).max() > 0
