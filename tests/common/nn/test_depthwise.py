"""Depthwise convolution equals XLA's own in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from common.nn.xla_cpu.depthwise import depthwise_conv


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5)])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "symmetric"])
def test_equals_lax(size, side, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 6)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 6)).astype(np.float32)
    strides = (stride, stride)
    if padding == "symmetric":
        pads = [(side // 2, side // 2)] * 2
    else:
        pads = lax.padtype_to_pads(size, (side, side), strides, padding)
    pads = tuple(tuple(pair) for pair in pads)

    def reference(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )

    ours, ours_vjp = jax.vjp(lambda x, k: depthwise_conv(x, k, strides, pads), x, kernel)
    expected, expected_vjp = jax.vjp(reference, x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for mine, theirs in zip(ours_vjp(cotangent), expected_vjp(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
