"""`Conv` equals XLA's own convolution in values and gradients, whatever its shape and type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from common.nn.layers.conv import Conv, conv2d


def _reference(x, kernel, strides, padding, groups):
    if isinstance(padding, int):
        padding = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    "size, channels, features, side, stride, padding, groups",
    [
        ((8, 8), 16, 24, 1, 1, 0, 1),
        ((8, 8), 24, 16, 1, 1, 0, 1),
        ((9, 7), 16, 24, 1, 2, 0, 1),
        ((8, 10), 16, 16, 3, 1, 1, 1),
        ((7, 5), 16, 20, 3, 1, "SAME", 1),
        ((8, 8), 20, 16, 3, 2, 1, 1),
        ((9, 11), 16, 16, 3, 2, 1, 1),
        ((9, 10), 16, 16, 3, 2, "SAME", 1),
        ((9, 10), 16, 16, 3, 2, "VALID", 1),
        ((16, 15), 3, 8, 7, 2, 3, 1),
        ((8, 8), 3, 160, 5, 2, "SAME", 1),
        ((8, 6), 16, 16, 3, 1, ((2, 0), (1, 3)), 1),
        ((8, 6), 16, 16, 3, 1, ((3, 1), (0, 4)), 1),  # more padding than the kernel reaches over
        ((8, 8), 64, 32, 3, 1, 1, 1),  # fewer positions than elements of three columns
        ((8, 8), 16, 24, 3, 1, 1, 4),
        ((8, 7), 16, 16, 3, 2, 1, 16),
        ((9, 8), 64, 96, 3, 2, 1, 32),
        ((8, 8), 48, 24, 3, 1, 1, 12),
        ((7, 8), 64, 64, 1, 1, 0, 2),
        ((16, 20), 32, 48, 3, 1, 1, 1),
        ((17, 14), 48, 32, 3, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_equals_lax(size, channels, features, side, stride, padding, groups, dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(side, side, channels // groups, features)), dtype)
    strides = (stride, stride)

    @jax.jit
    def ours(x, kernel, cotangent):
        y, vjp = jax.vjp(lambda x, k: conv2d(x, k, strides, padding, groups), x, kernel)
        return y, *vjp(cotangent)

    @jax.jit
    def theirs(x, kernel, cotangent):
        x, kernel, cotangent = (a.astype(jnp.float32) for a in (x, kernel, cotangent))
        y, vjp = jax.vjp(lambda x, k: _reference(x, k, strides, padding, groups), x, kernel)
        return y, *vjp(cotangent)

    shape = jax.eval_shape(lambda: _reference(x, kernel, strides, padding, groups)).shape
    cotangent = jnp.asarray(rng.normal(size=shape), dtype)
    results = zip(ours(x, kernel, cotangent), theirs(x, kernel, cotangent), strict=True)
    for mine, expected in results:
        assert mine.dtype == x.dtype
        error = jnp.abs(mine.astype(jnp.float32) - expected).max()
        assert error <= tolerance * jnp.abs(expected).max()


def test_module_adds_bias_and_keeps_float32_parameters():
    conv = Conv(5, (3, 3), use_bias=True, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 3))
    variables = conv.init(jax.random.key(0), x)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), variables["params"]) == {
        "kernel": ((3, 3, 3, 5), jnp.float32),
        "bias": ((5,), jnp.float32),
    }
    params = {"kernel": jnp.zeros((3, 3, 3, 5)), "bias": jnp.arange(5.0)}
    y = conv.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(5.0), (1, 4, 4, 5)))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_cpu_splits_grouped_convolutions(platform):
    def conv(x, kernel):
        return conv2d(x, kernel, padding=1, groups=4)

    x, kernel = jnp.ones((1, 8, 8, 32)), jnp.ones((3, 3, 8, 32))
    gradients = jax.grad(lambda x, kernel: conv(x, kernel).sum(), argnums=(0, 1))
    forward, backward = (
        jax.jit(f).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        for f in (conv, gradients)
    )
    assert ("feature_group_count = 4" in forward) == (platform != "cpu")
    # Of the gradients only the kernel's is split; XLA:CPU's own of the input is fast.
    assert "feature_group_count = 4" in backward
    assert all(("stablehlo.while" in f) == (platform == "cpu") for f in (forward, backward))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_cpu_writes_convolutions_as_matmuls(platform, kernel_size):
    def loss(x, kernel):
        return (conv2d(x, kernel, padding=kernel_size // 2) ** 2).sum()

    x, kernel = jnp.ones((1, 8, 8, 32)), jnp.ones((kernel_size, kernel_size, 32, 16))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.dot_general" in program) == (platform == "cpu")
    assert ("stablehlo.convolution" in program) == (platform != "cpu" or kernel_size == 3)
