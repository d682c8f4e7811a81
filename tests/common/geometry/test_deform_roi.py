"""Deformable RoI pooling equals RoIAlign without offsets, and the brute-force twin with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import bilinear, roi_align
from common.geometry.deform_roi import SAMPLE_MODES, deform_roi_align
from tests.oracles import deform_roi as oracle

STRIDES = (4, 8)
CANVAS = (96, 128)  # height, width


def make_arrays(seed, channels=3, bins=3, offset_scale=0.2):
    """Features, boxes (ordinary, partly outside, empty, elongated, whole canvas), offsets."""
    rng = np.random.default_rng(seed)
    height, width = CANVAS
    features = tuple(
        rng.normal(size=(2, height // s, width // s, channels)).astype(np.float32) for s in STRIDES
    )
    corner = rng.uniform(0, 60, (2, 3, 2))
    ordinary = np.concatenate([corner, corner + rng.uniform(10, 60, (2, 3, 2))], -1)
    special = [
        [-30, -20, 40, 50],
        [width - 20, height - 30, width + 60, height + 10],
        [10, 10, 10, 10],
        [3, 40, width - 5, 44],
        [0, 0, width, height],
    ]
    boxes = np.concatenate([ordinary, np.tile(np.array(special), (2, 1, 1))], 1).astype(np.float32)
    offsets = offset_scale * rng.normal(size=(*boxes.shape[:2], bins, bins, 2))
    return features, boxes, offsets.astype(np.float32)


@functools.partial(
    jax.jit, static_argnames=("method", "output_size", "sampling_ratio", "aligned", "sample_mode")
)
def crop_and_gradients(features, boxes, offsets, gradient, **options):
    def crop(features, boxes, offsets):
        return deform_roi_align(features, boxes, offsets, STRIDES, **options)

    output, transpose = jax.vjp(crop, features, boxes, offsets)
    return output, transpose(gradient)


@pytest.mark.parametrize("method", bilinear.METHODS)
@pytest.mark.parametrize("aligned", [True, False])
def test_without_offsets_it_is_roi_align(method, aligned):
    features, boxes, _ = make_arrays(0)
    gradient = np.random.default_rng(1).normal(size=(2, 8, 7, 7, 3)).astype(np.float32)
    offsets = np.zeros((2, 8, 7, 7, 2), np.float32)
    output, (found, _, _) = crop_and_gradients(
        features, boxes, offsets, gradient, method=method, aligned=aligned
    )
    crop = functools.partial(roi_align.roi_align, strides=STRIDES, aligned=aligned)
    expected, transpose = jax.vjp(jax.jit(lambda maps: crop(maps, boxes)), features)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    for ours, theirs in zip(found, transpose(gradient)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("method", bilinear.METHODS)
@pytest.mark.parametrize(
    "options",
    [
        dict(sampling_ratio=2, aligned=True, sample_mode="centre"),
        dict(sampling_ratio=3, aligned=False, sample_mode="edge"),
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_twin(method, options):
    features, boxes, offsets = make_arrays(2)
    gradient = np.random.default_rng(3).normal(size=(2, 8, 3, 3, 3)).astype(np.float32)
    position = SAMPLE_MODES[options["sample_mode"]]
    twin = (3, options["sampling_ratio"], options["aligned"], position)
    values = oracle.deform_roi_align(features, boxes, offsets, STRIDES, *twin)
    maps_grad, offsets_grad = oracle.gradients(features, boxes, offsets, STRIDES, gradient, *twin)
    output, (found, boxes_found, offsets_found) = crop_and_gradients(
        features, boxes, offsets, gradient, method=method, output_size=3, **options
    )
    np.testing.assert_allclose(output, values, atol=1e-4)
    for ours, theirs in zip(found, maps_grad, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert not np.any(boxes_found)
    np.testing.assert_allclose(offsets_found, offsets_grad, atol=1e-3)


@pytest.mark.parametrize("method", bilinear.METHODS)
def test_one_offset_for_all_bins_moves_the_roi_but_not_its_level(method):
    """As RoIAlign of the moved box, which is so small that only its own level is read."""
    features, _, _ = make_arrays(4)
    boxes = np.array([[[16, 20, 48, 60]], [[40, 24, 88, 60]]], np.float32)
    offsets = np.array([[0.3, -0.1], [-0.2, 0.25]], np.float32).reshape(2, 1, 1, 1, 2)
    size = boxes[..., 2:] - boxes[..., :2]
    moved = boxes + np.tile(offsets[:, :, 0, 0] * size, 2)
    crop = functools.partial(deform_roi_align, strides=STRIDES, output_size=3, method=method)
    found = jax.jit(crop)(features, boxes, offsets)
    expected = roi_align.roi_align(features, moved, STRIDES, output_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_level_is_that_of_the_box_wherever_its_bins_lie():
    features = tuple(
        jnp.full((1, CANVAS[0] // s, CANVAS[1] // s, 1), 10.0 * level)
        for level, s in enumerate(STRIDES)
    )
    boxes = np.array([[[30, 30, 60, 60], [8, 8, 125, 125]]], np.float32)
    offsets = np.random.default_rng(5).uniform(-0.1, 0.0, (1, 2, 2, 2, 2)).astype(np.float32)
    crops = deform_roi_align(features, boxes, offsets, STRIDES, output_size=2)
    np.testing.assert_allclose(crops[0, :, 0, 0, 0], [0, 10], atol=1e-5)


@pytest.mark.parametrize("method", bilinear.METHODS)
def test_bfloat16_features_keep_their_type_and_broken_boxes_stay_inside_memory(method):
    features, boxes, offsets = make_arrays(6)
    features = tuple(jnp.asarray(feature, jnp.bfloat16) for feature in features)
    boxes[0, 0] = np.nan
    boxes[0, 1] = (0, 0, np.inf, 5)
    gradient = jnp.ones((2, 8, 3, 3, 3), jnp.bfloat16)
    output, (maps_grad, _, offsets_grad) = crop_and_gradients(
        features, boxes, offsets, gradient, method=method, output_size=3
    )
    assert output.dtype == jnp.bfloat16
    assert all(grad.dtype == jnp.bfloat16 for grad in maps_grad)
    assert offsets_grad.dtype == jnp.float32


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(method="einsum"), "method 'einsum'"),
        (dict(sample_mode="middle"), "sample_mode 'middle'"),
        (dict(output_size=7), "offsets of shape .*expected .2, 8, 7, 7, 2."),
        (dict(sampling_ratio=0), "sampling_ratio 0"),
        (dict(strides=(4, 16)), "each twice the one before"),
    ],
)
def test_wrong_arguments_are_refused(change, text):
    features, boxes, offsets = make_arrays(7)
    options = {"strides": STRIDES, "output_size": 3, **change}
    with pytest.raises(ValueError, match=text):
        deform_roi_align(features, boxes, offsets, **options)
