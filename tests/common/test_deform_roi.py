"""Deformable RoI pooling equals its twin, and RoIAlign where nothing is shifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.bilinear import METHODS
from common.deform_roi import deform_roi_align
from common.roi_align import roi_align
from tests.oracles import deform_roi as oracle

STRIDES = (4, 8)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(2, 16 // s, 20 // s, 3)).astype(np.float32) for s in (1, 2)]
    corner = rng.uniform(-8, 50, (2, 5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 40, (2, 5, 2))], -1)
    boxes[:, -1] = [[0, 0, 300, 200]]  # of the coarser level
    offsets = rng.normal(0, 0.2, (2, 5, 3, 3, 2))
    return features, boxes.astype(np.float32), offsets.astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["centre", "edge"])
def test_values_equal_the_twin(case, method, mode):
    options = dict(output_size=3, sampling_ratio=2, sample_mode=mode, method=method)
    ours = deform_roi_align(*case, STRIDES, **options)
    np.testing.assert_allclose(
        ours, oracle.deform_roi_align(*case, STRIDES, 3, 2, mode), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_differences_of_the_twin(case, method):
    features, boxes, offsets = case
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(2, 5, 3, 3, 3))

    def ours(features, offsets):
        pooled = deform_roi_align(
            features, boxes, offsets, STRIDES, output_size=3, method=method
        )
        return (pooled * weights).sum()

    def twin(features, offsets):
        pooled = oracle.deform_roi_align(features, boxes, offsets, STRIDES, 3, 2, "centre")
        return (pooled * weights).sum()

    to_features, to_offsets = jax.grad(ours, argnums=(0, 1))(
        [jnp.asarray(f) for f in features], jnp.asarray(offsets)
    )
    step = 1e-3
    for _ in range(6):
        at = tuple(int(rng.integers(n)) for n in offsets.shape)
        high, low = offsets.astype(np.float64), offsets.astype(np.float64)
        high[at] += step * 1e-2  # short: the derivative jumps from cell to cell
        low[at] -= step * 1e-2
        expected = (twin(features, high) - twin(features, low)) / (2e-2 * step)
        np.testing.assert_allclose(to_offsets[at], expected, rtol=2e-2, atol=1e-3)
        level = int(rng.integers(2))
        at = tuple(int(rng.integers(n)) for n in features[level].shape)
        moved = [f.astype(np.float64) for f in features]
        moved[level][at] += step
        expected = (twin(moved, offsets) - twin(features, offsets)) / step
        np.testing.assert_allclose(to_features[level][at], expected, rtol=1e-3, atol=1e-3)


def test_zero_shifts_are_roi_align_and_boxes_get_no_gradient(case):
    features, boxes, offsets = case
    plain = roi_align(features, boxes, STRIDES, output_size=3)
    shifted = deform_roi_align(features, boxes, 0 * offsets, STRIDES, output_size=3)
    np.testing.assert_allclose(shifted, plain, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(
        lambda boxes: deform_roi_align(features, boxes, offsets, STRIDES, output_size=3).sum()
    )(jnp.asarray(boxes))
    assert not np.asarray(gradient).any()


def test_the_same_shift_of_every_bin_is_roi_align_of_the_moved_box(case):
    features, boxes, _ = case
    small = boxes[:, :4]
    shift = np.broadcast_to(np.float32([0.1, -0.15]), (2, 4, 3, 3, 2))
    size = small[..., 2:] - small[..., :2]
    moved = small + np.tile(size * np.float32([0.1, -0.15]), 2)
    np.testing.assert_allclose(
        deform_roi_align(features, small, shift, STRIDES, output_size=3),
        roi_align(features, moved, STRIDES, output_size=3), rtol=1e-4, atol=1e-5,
    )


def test_unknown_sample_mode_is_refused(case):
    with pytest.raises(ValueError, match="sample_mode 'corner', expected one of"):
        deform_roi_align(*case, STRIDES, output_size=3, sample_mode="corner")
