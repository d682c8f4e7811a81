"""Squeeze-and-excitation (Hu et al. 2018).

Shapes: B images, h w height and width, D channels.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def squeeze_excite(
    conv: Callable, x: Float[Array, "B h w D"], features: int, activation: Callable
) -> Float[Array, "B h w D"]:
    """Multiplies channels with gates in (0, 1), a function of the channels' means over the image.

    Call it in a compact method, whose module gets the convolutions `se_reduce` and `se_expand`.
    `features` is the width between the two.
    """
    squeezed = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
    gate = activation(conv(features, 1, use_bias=True, name="se_reduce")(squeezed))
    return x * nn.sigmoid(conv(x.shape[-1], 1, use_bias=True, name="se_expand")(gate))
