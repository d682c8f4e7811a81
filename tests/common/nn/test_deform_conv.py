"""Deformable convolution equals the brute-force twin and torchvision, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import bilinear
from common.nn.layers.conv import Conv, conv2d
from common.nn.layers.deform_conv import DeformConv, deform_conv2d
from tests.oracles import deform_conv as oracle

# (C, D, version, options)
CASES = {
    "v1": (4, 6, 1, dict(padding=1)),
    "v2": (4, 6, 2, dict(padding=1)),
    "grouped, stride 2": (8, 4, 2, dict(padding=1, stride=2, groups=4)),
    "dilation 2, no padding": (4, 4, 1, dict(dilation=2, groups=2)),
}


def make_arrays(case, seed=0, spread=2.0):
    """x, offsets, kernel, mask or None, gradient of the output; offsets reach over the border."""
    channels, features, version, options = CASES[case]
    rng = np.random.default_rng(seed)
    kernel_shape = (3, 3, channels // options.get("groups", 1), features)
    reach = 2 * options.get("dilation", 1) + 1
    size = [
        (side + 2 * options.get("padding", 0) - reach) // options.get("stride", 1) + 1
        for side in (7, 9)
    ]
    out = (2, *size)
    shapes = ((2, 7, 9, channels), (*out, 18), kernel_shape, (*out, 9), (*out, features))
    x, offsets, kernel, mask, gradient = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x, spread * offsets, kernel, mask if version == 2 else None, gradient


@functools.partial(jax.jit, static_argnames=("case", "method"))
def value_and_gradients(case, method, x, offsets, kernel, mask, gradient):
    """Output and gradients of x, offsets, kernel and, in version 2, mask."""

    def conv(x, offsets, kernel, mask):
        return deform_conv2d(x, offsets, kernel, mask=mask, method=method, **CASES[case][-1])

    output, transpose = jax.vjp(conv, x, offsets, kernel, mask)
    return output, *transpose(gradient)


@functools.cache
def twin_case(case):
    *arrays, gradient = make_arrays(case)
    options = CASES[case][-1]
    values = oracle.deform_conv2d(*arrays, **options)
    return (*arrays, gradient), (values, *oracle.gradients(*arrays, gradient, **options))


@pytest.mark.parametrize("method", bilinear.METHODS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_twin(case, method):
    arrays, expected = twin_case(case)
    found = value_and_gradients(case, method, *arrays)
    for name, ours, theirs in zip(
        ("output", "x", "offsets", "kernel", "mask"), found, expected, strict=True
    ):
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision(case):
    torch = pytest.importorskip("torch", reason="optional peer")
    torchvision = pytest.importorskip("torchvision", reason="optional peer")
    arrays = make_arrays(case, seed=1)

    def to_torch(array, axes=(0, 3, 1, 2)):
        return torch.from_numpy(array.transpose(axes).copy()).requires_grad_()

    x, offsets, mask, gradient = (
        None if arrays[i] is None else to_torch(arrays[i]) for i in (0, 1, 3, 4)
    )
    kernel = to_torch(arrays[2], (3, 2, 0, 1))
    options = {name: v for name, v in CASES[case][-1].items() if name != "groups"}
    theirs = torchvision.ops.deform_conv2d(x, offsets, kernel, mask=mask, **options)
    theirs.backward(gradient)
    expected = [theirs.detach(), x.grad, offsets.grad, kernel.grad]
    axes = [(0, 2, 3, 1)] * 3 + [(2, 3, 1, 0)]
    if mask is not None:
        expected.append(mask.grad)
        axes.append((0, 2, 3, 1))
    found = value_and_gradients(case, None, *arrays)
    for ours, tensor, order in zip(found, expected, axes, strict=False):
        np.testing.assert_allclose(ours, tensor.numpy().transpose(order), atol=1e-4)


@pytest.mark.parametrize("method", bilinear.METHODS)
@pytest.mark.parametrize("padding, stride, groups", [("SAME", 2, 1), ("VALID", 1, 2), (2, 1, 32)])
def test_without_offsets_it_is_an_ordinary_convolution(padding, stride, groups, method):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 8, 7, 128)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 128 // groups, 64)).astype(np.float32)
    expected = conv2d(x, kernel, (stride, stride), padding, groups)
    found = deform_conv2d(
        x,
        jnp.zeros((*expected.shape[:3], 18)),
        kernel,
        stride=stride,
        padding=padding,
        groups=groups,
        method=method,
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", bilinear.METHODS)
def test_bfloat16_keeps_its_type_in_both_directions(method):
    arrays = make_arrays("v2", seed=3)
    exact = value_and_gradients("v2", method, *arrays)
    found = value_and_gradients("v2", method, *(jnp.asarray(a, jnp.bfloat16) for a in arrays))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours, np.float32) - theirs).mean()
        assert error < 0.03 * np.abs(theirs).mean()


@pytest.mark.parametrize("method", bilinear.METHODS)
def test_points_far_outside_count_as_zero_and_broken_ones_stay_inside_memory(method):
    x, offsets, kernel, mask, gradient = make_arrays("v2", seed=4)
    far = np.where(offsets > 0, 3e38, -np.inf).astype(np.float32)
    for array in value_and_gradients("v2", method, x, far, kernel, mask, gradient):
        assert not np.any(array)
    broken = np.full_like(offsets, np.nan)
    jax.block_until_ready(value_and_gradients("v2", method, x, broken, kernel, mask, gradient))


@pytest.mark.parametrize("platform, row", [("tpu", 4), ("cpu", 1), ("cuda", 1)])
def test_the_platform_of_the_lowering_chooses_the_form_and_memory_stays_small(platform, row):
    """Neither form holds the samples of all kernel elements, or float32 copies of bfloat16 maps."""
    batch, size, channels, taps = 2, 32, 64, 9
    shapes = ((batch, size, size, channels), (batch, size, size, 2 * taps), (3, 3, channels, 64))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def conv(x, offsets, kernel):
        return deform_conv2d(x, offsets, kernel, padding=1)

    text = jax.jit(conv).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    tensors = re.findall(r"tensor<([\dx]+)x(bf16|f32)>", text)
    sizes = {kind: [] for kind in ("bf16", "f32")}
    for shape, kind in tensors:
        sizes[kind].append(np.prod([int(side) for side in shape.split("x")]))
    grid = (size + 1) ** 2 if row == 4 else size**2
    assert f"tensor<{grid}x{row * channels}xbf16>" in text
    assert max(sizes["bf16"]) <= row * grid * channels * (batch if row == 1 else 1)
    assert max(sizes["f32"]) <= size**2 * channels * batch


def test_the_layer_starts_as_the_convolution_that_it_replaces():
    x = np.random.default_rng(5).normal(size=(1, 6, 5, 8)).astype(np.float32)
    fields = dict(features=12, kernel_size=3, strides=2, padding=1, groups=4)
    ordinary = Conv(**fields)
    variables = ordinary.init(jax.random.key(0), x)
    for version, channels, factor in ((1, 18, 1.0), (2, 27, 0.5)):
        layer = DeformConv(**fields, version=version)
        params = layer.init(jax.random.key(0), x)["params"]
        shapes = jax.tree.map(jnp.shape, params)
        offset = {"kernel": (3, 3, 8, channels), "bias": (channels,)}
        assert shapes == {"kernel": (3, 3, 2, 12), "offset": offset}
        assert not any(map(np.any, jax.tree.leaves(params["offset"])))
        output = layer.apply({"params": {**variables["params"], "offset": params["offset"]}}, x)
        np.testing.assert_allclose(output, factor * ordinary.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_the_layer_reads_its_branch_row_first_and_factors_last(version):
    """Bias of the branch: tap 4 (the middle) moves one row down and two columns to the right."""
    x = np.random.default_rng(6).normal(size=(1, 6, 7, 1)).astype(np.float32)
    bias = np.zeros(9 * (version + 1), np.float32)
    bias[8], bias[9] = 1.0, 2.0
    bias[18:] = -100.0
    bias[22:23] = 100.0
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1.0
    if version == 2:
        kernel[0, 0] = 5.0  # its factor is zero
    offset = {"kernel": np.zeros((3, 3, 1, len(bias)), np.float32), "bias": bias}
    layer = DeformConv(1, padding=1, version=version, use_bias=True)
    params = {"kernel": kernel, "offset": offset, "bias": np.ones(1, np.float32)}
    output = layer.apply({"params": params}, x)
    np.testing.assert_allclose(output[:, :-1, :-2], x[:, 1:, 2:] + 1, atol=1e-6)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(method="columns"), "method 'columns'"),
        (dict(offsets=np.zeros((2, 7, 9, 9))), "offsets of shape .*expected .2, 7, 9, 18."),
        (dict(mask=np.zeros((2, 7, 9, 18))), "mask of shape"),
    ],
)
def test_wrong_arguments_are_refused(change, text):
    x, offsets, kernel, mask, _ = make_arrays("v2")
    arguments = dict(x=x, offsets=offsets, kernel=kernel, mask=mask, padding=1)
    with pytest.raises(ValueError, match=text):
        deform_conv2d(**{**arguments, **change})
