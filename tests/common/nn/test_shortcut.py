"""ReLU at the end of a shortcut: values and gradients of ReLU, computed once on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common.nn.layers.conv import conv2d
from common.nn.xla_cpu.shortcut import relu_of_sum


def test_it_is_relu_and_lets_nan_through():
    x = jnp.array([-2.0, -0.0, 0.0, 3.0, jnp.nan, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(relu_of_sum(x), nn.relu(x))
    finite = x[:4]
    gradients = [jax.grad(lambda x, f=f: (f(x) * 5).sum())(finite) for f in (relu_of_sum, nn.relu)]
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_the_plain_relu(platform):
    lowered = (
        jax.jit(relu_of_sum).trace(jnp.ones((1, 4, 4, 8))).lower(lowering_platforms=(platform,))
    )
    text = lowered.as_text()
    assert "stablehlo.maximum" in text and "stablehlo.select" not in text


def test_blocks_do_not_sum_up_the_blocks_before_them_again():
    """On CPU: as many additions in the compiled program as there are blocks, not their square."""
    blocks = 8

    def network(x, kernels, scale):
        for kernel in kernels:
            x = relu_of_sum(conv2d(x, kernel, padding=1) * scale + x)
        return x

    x, kernels = jnp.ones((2, 16, 16, 8)), [jnp.ones((3, 3, 8, 8))] * blocks
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(network).lower(x, kernels, jnp.ones(8)).compile()
    additions = compiled.as_text().count(" add(")
    assert blocks <= additions <= 2 * blocks
