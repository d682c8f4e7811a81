"""RoIAlign: all forms equal the brute-force twin (and torchvision), values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import roi_align
from tests.oracles import roi_align as oracle

STRIDES = (4, 8, 16, 32)
CANVAS = (160, 224)  # height, width; gives maps from 40 x 56 down to 5 x 7


def make_features(seed, channels=3, strides=STRIDES):
    rng = np.random.default_rng(seed)
    shapes = [(2, CANVAS[0] // s, CANVAS[1] // s, channels) for s in strides]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def make_boxes(seed):
    """(2, 14, 4): ordinary, partly and wholly outside, tiny, empty, elongated, whole canvas."""
    rng = np.random.default_rng(seed)
    height, width = CANVAS
    ordinary = rng.uniform(0, 150, (2, 5, 2))
    ordinary = np.concatenate([ordinary, ordinary + rng.uniform(5, 120, (2, 5, 2))], -1)
    special = [
        [-30, -20, 40, 50],
        [width - 20, height - 30, width + 60, height + 10],
        [width + 90, height + 90, width + 120, height + 130],
        [50.3, 60.1, 50.4, 60.3],
        [10, 10, 10, 10],
        [0, 80, width, 84],
        [100, 0, 102, height],
        [0, 0, width, height],
        [-500, -400, 700, 600],
    ]
    special = np.tile(np.array(special)[None], (2, 1, 1))
    return np.concatenate([ordinary, special], axis=1).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("method", "output_size", "sampling_ratio", "aligned"))
def crop_and_gradients(features, boxes, gradient, method, **options):
    def crop(features):
        return roi_align.roi_align(features, boxes, STRIDES, method=method, **options)

    output, transpose = jax.vjp(crop, features)
    return output, transpose(gradient)[0]


@functools.cache
def twin_case(output_size, sampling_ratio, aligned):
    """Inputs with the twin's crops and feature gradients, once for all methods."""
    features, boxes = make_features(0), make_boxes(1)
    shape = (*boxes.shape[:2], output_size, output_size, 3)
    gradient = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    options = (output_size, sampling_ratio, aligned)
    values = oracle.roi_align(features, boxes, STRIDES, *options)
    gradients = oracle.feature_gradients(features, boxes, STRIDES, gradient, *options)
    return features, boxes, gradient, values, gradients


@pytest.mark.parametrize("method", roi_align.METHODS)
@pytest.mark.parametrize(
    "options",
    [
        dict(output_size=7, sampling_ratio=2, aligned=True),
        dict(output_size=7, sampling_ratio=2, aligned=False),
        dict(output_size=5, sampling_ratio=1, aligned=True),
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_twin(method, options):
    features, boxes, gradient, values, value_gradients = twin_case(**options)
    output, gradients = crop_and_gradients(features, boxes, gradient, method, **options)
    np.testing.assert_allclose(output, values, atol=1e-4)
    for ours, theirs in zip(gradients, value_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("method", roi_align.METHODS)
def test_samples_on_the_border_rule_of_one_cell(method):
    """Zero beyond [-1, size], clamped inside: a map of ones shows which samples count."""
    ones = (np.ones((1, 8, 8, 1), np.float32),)
    # One bin, one sample, in the middle of the box: at -1, just beyond, at size, just beyond.
    centres = np.array([-1.0, -1.01, 8.0, 8.01, 3.0]) + 0.5
    boxes = np.stack([centres - 1, np.full(5, 3.0), centres + 1, np.full(5, 5.0)], -1)[None] * 4
    crops = roi_align.roi_align(
        ones, jnp.asarray(boxes, jnp.float32), (4,), output_size=1, sampling_ratio=1, method=method
    )
    np.testing.assert_allclose(crops.ravel(), [1, 0, 1, 0, 1], atol=1e-6)


def test_levels_follow_the_size_of_the_box():
    sizes = np.array([0, 1, 111, 112, 223, 224, 447, 448, 896, 1e5], np.float32)
    boxes = np.stack([sizes * 0, sizes * 0, sizes, sizes], -1)
    np.testing.assert_array_equal(roi_align.assign_levels(boxes), [2, 2, 2, 3, 3, 4, 4, 5, 5, 5])
    wide = np.array([0, 0, 448, 112], np.float32)
    assert roi_align.assign_levels(wide) == 4
    assert roi_align.assign_levels(wide, min_level=5, max_level=6) == 5


@pytest.mark.parametrize("method", roi_align.METHODS)
def test_each_roi_reads_its_own_level_and_image_only(method):
    features = tuple(
        np.full((2, CANVAS[0] // s, CANVAS[1] // s, 1), 10.0 * level, np.float32)
        + np.arange(2, dtype=np.float32)[:, None, None, None]
        for level, s in enumerate(STRIDES)
    )
    boxes = np.tile(np.array([[20, 20, 80, 80], [10, 10, 130, 130]], np.float32), (2, 1, 1))
    crop = functools.partial(roi_align.roi_align, strides=STRIDES, output_size=2, method=method)
    crops = jax.jit(crop)(features, boxes)
    np.testing.assert_allclose(crops[..., 0].mean((2, 3)), [[0, 10], [1, 11]], rtol=1e-5)


@pytest.mark.parametrize("method", roi_align.METHODS)
def test_bfloat16_features_keep_their_type_in_both_directions(method):
    features = tuple(jnp.asarray(f, jnp.bfloat16) for f in make_features(3))
    boxes = make_boxes(4)
    gradient = jnp.ones((*boxes.shape[:2], 7, 7, 3), jnp.bfloat16)
    output, gradients = crop_and_gradients(features, boxes, gradient, method)
    assert output.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    exact = jax.jit(functools.partial(roi_align.roi_align, strides=STRIDES, method="gather"))(
        tuple(f.astype(jnp.float32) for f in features), boxes
    )
    np.testing.assert_allclose(np.asarray(output, np.float32), exact, atol=0.05)


@pytest.mark.parametrize("method", roi_align.METHODS)
def test_boxes_get_no_gradient_and_broken_boxes_do_not_hang(method):
    features, boxes = make_features(5), make_boxes(6)

    def total(boxes):
        return jnp.sum(roi_align.roi_align(features, boxes, STRIDES, method=method))

    assert not np.any(jax.jit(jax.grad(total))(boxes))
    broken = np.array([[[np.nan] * 4, [0, 0, np.inf, 5], [9, 9, 1, 1]]] * 2, np.float32)
    gradient = np.ones((2, 3, 7, 7, 3), np.float32)
    jax.block_until_ready(crop_and_gradients(features, broken, gradient, method))


@pytest.mark.parametrize("platform, dense", [("tpu", True), ("cpu", False), ("cuda", False)])
def test_the_platform_of_the_lowering_chooses_the_form(platform, dense):
    """A program lowered for TPU on a CPU host contracts; one for CPU or GPU gathers."""
    features, boxes = make_features(7), make_boxes(8)
    gradient = np.ones((2, boxes.shape[1], 7, 7, 3), np.float32)
    traced = crop_and_gradients.trace(features, boxes, gradient, None)
    lowered = traced.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("stablehlo.dot_general" in text) == dense
    assert ("stablehlo.while" in text) == (platform == "cpu")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("method", roi_align.METHODS)
def test_equals_torchvision(method, aligned):
    torch = pytest.importorskip("torch", reason="optional peer")
    torchvision = pytest.importorskip("torchvision", reason="optional peer")
    features, boxes = make_features(9), make_boxes(10)
    gradient = np.random.default_rng(11).normal(size=(*boxes.shape[:2], 7, 7, 3)).astype("f")
    output, gradients = crop_and_gradients(
        features, boxes, gradient, method, output_size=7, sampling_ratio=2, aligned=aligned
    )
    levels = np.asarray(roi_align.assign_levels(boxes)) - 2
    for level, stride in enumerate(STRIDES):
        image, roi = np.nonzero(levels == level)
        rois = np.concatenate([image[:, None], boxes[image, roi]], 1).astype(np.float32)
        maps = torch.from_numpy(features[level].transpose(0, 3, 1, 2).copy()).requires_grad_()
        theirs = torchvision.ops.roi_align(
            maps, torch.from_numpy(rois), 7, 1.0 / stride, 2, aligned
        )
        theirs.backward(torch.from_numpy(gradient[image, roi].transpose(0, 3, 1, 2).copy()))
        values = theirs.detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(output[image, roi], values, atol=1e-4)
        expected = maps.grad.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(gradients[level], expected, atol=2e-4)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(method="crop"), "method 'crop'"),
        (dict(sampling_ratio=0), "sampling_ratio 0"),
        (dict(strides=(4, 8, 16)), "4 feature maps but 3 strides"),
        (dict(strides=(4, 8, 16, 64)), "each twice the one before"),
    ],
)
def test_wrong_arguments_are_refused(options, text):
    options = {"strides": STRIDES, **options}
    with pytest.raises(ValueError, match=text):
        roi_align.roi_align(make_features(0), make_boxes(0), **options)
