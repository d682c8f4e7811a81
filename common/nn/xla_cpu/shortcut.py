"""The end of a shortcut: ReLU of a sum that XLA:CPU computes once."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


def relu_of_sum(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """ReLU of a map that a convolution reads and the next shortcut adds to.

    XLA:CPU takes a maximum with a constant for cheap enough to compute again in each reader, and
    with it the sum below: block n of a stage then adds up n blocks again. It does not do so with a
    choice between two maps. TPU and GPU weigh fusions by their cost and get the plain ReLU.
    """
    return lax.platform_dependent(x, cpu=lambda x: jnp.where(x <= 0, 0, x), default=nn.relu)
