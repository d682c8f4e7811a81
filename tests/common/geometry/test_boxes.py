"""Box arithmetic against its one-pair-at-a-time twin, and its behaviour on degenerate boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.geometry import boxes as box_ops
from tests.oracles import boxes as oracle

# Small integer coordinates make touching, equal, nested, empty and inverted boxes common.
grid_boxes = hnp.arrays(np.float32, (6, 4), elements=st.integers(-4, 8).map(float))


def proper_boxes(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-50, 500, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(0.5, 300, (count, 2))], 1).astype("f")


@jax.jit
def overlaps(a, b):
    return box_ops.area(a), box_ops.iou(a, b), box_ops.ioa(a, b), box_ops.is_valid(a)


@settings(max_examples=100, deadline=None)
@given(grid_boxes, grid_boxes)
def test_overlaps_equal_the_twin(a, b):
    areas, iou, ioa, is_valid = overlaps(a, b)
    np.testing.assert_allclose(areas, [oracle.area(box) for box in a])
    np.testing.assert_allclose(iou, oracle.pairwise(oracle.iou, a, b), rtol=1e-6)
    np.testing.assert_allclose(ioa, oracle.pairwise(oracle.ioa, a, b), rtol=1e-6)
    valid = [box[2] > box[0] and box[3] > box[1] for box in a]
    np.testing.assert_array_equal(is_valid, valid)
    np.testing.assert_allclose(
        box_ops.paired_iou(a, a[::-1]), np.diag(box_ops.iou(a, a[::-1])), rtol=1e-6
    )


def test_overlaps_take_leading_dimensions():
    a, b = proper_boxes(0, 12).reshape(3, 4, 4), proper_boxes(1, 15).reshape(3, 5, 4)
    batched = box_ops.iou(a, b)
    assert batched.shape == (3, 4, 5)
    for i in range(3):
        np.testing.assert_array_equal(batched[i], box_ops.iou(a[i], b[i]))


@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_encode_equals_the_twin_and_decode_inverts_it(stds):
    boxes, references = proper_boxes(2, 50), proper_boxes(3, 50)
    deltas = box_ops.encode(boxes, references, stds)
    expected = [oracle.encode(p, q, stds) for p, q in zip(boxes, references, strict=True)]
    np.testing.assert_allclose(deltas, expected, rtol=1e-4, atol=1e-4)
    decoded = box_ops.decode(deltas, references, stds, max_log_ratio=10.0)
    np.testing.assert_allclose(decoded, boxes, rtol=1e-4, atol=1e-2)


def test_decode_limits_growth_but_not_shrinking():
    reference = jnp.array([0.0, 0.0, 16.0, 16.0])
    grown = box_ops.decode(jnp.array([0.0, 0.0, 50.0, 50.0]), reference)
    np.testing.assert_allclose(grown, [-492.0, -492.0, 508.0, 508.0], rtol=1e-5)
    shrunk = box_ops.decode(jnp.array([0.0, 0.0, -50.0, -50.0]), reference)
    np.testing.assert_allclose(shrunk, [8.0, 8.0, 8.0, 8.0], rtol=1e-5)


def test_decode_broadcasts_references_over_classes():
    deltas = jnp.asarray(np.random.default_rng(4).normal(size=(5, 3, 4)), jnp.float32)
    references = proper_boxes(5, 5)
    per_class = box_ops.decode(deltas, references[:, None])
    for c in range(3):
        expected = box_ops.decode(deltas[:, c], references)
        np.testing.assert_allclose(per_class[:, c], expected, rtol=1e-6)


def test_clip_uses_each_images_own_size():
    boxes = jnp.array([[[-5.0, -5.0, 50.0, 50.0]], [[-5.0, 3.0, 15.0, 50.0]]])
    clipped = box_ops.clip(boxes, jnp.array([[20.0, 30.0], [40.0, 10.0]]))
    np.testing.assert_array_equal(clipped, [[[0, 0, 30, 20]], [[0, 3, 10, 40]]])


@jax.jit
def values_and_gradients(a, b):
    return [
        jax.value_and_grad(lambda a, b, function=function: jnp.sum(function(a, b)), (0, 1))(a, b)
        for function in (box_ops.iou, box_ops.ioa, box_ops.encode, box_ops.decode)
    ]


@settings(max_examples=50, deadline=None)
@given(grid_boxes, grid_boxes)
def test_no_box_makes_a_gradient_infinite(a, b):
    for value, gradients in values_and_gradients(a, b):
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
