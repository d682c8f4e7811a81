"""Winograd's form of a convolution: values and gradients of the convolution itself."""

import jax
import numpy as np
import pytest

from common.nn.layers.conv import conv2d
from common.nn.xla_cpu.winograd import small_conv, winograd_conv


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (winograd_conv, (2, 14, 14, 5, 7)),
        (winograd_conv, (1, 4, 6, 3, 2)),
        (small_conv, (1, 6, 4, 3, 2)),
        (small_conv, (1, 5, 6, 3, 2)),
    ],
)
def test_it_is_the_convolution(function, shape):
    batch, height, width, channels, features = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)
    weights = rng.normal(size=(batch, height, width, features)).astype(np.float32)

    def both(conv):
        result, transpose = jax.vjp(conv, x, kernel)
        return result, *transpose(weights)

    found = jax.jit(lambda: both(function))()
    expected = jax.jit(lambda: both(lambda x, kernel: conv2d(x, kernel, padding=1)))()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
