"""Foreground probabilities as whole numbers, which devices hand to hosts and masks are pasted from.

16 bits are half the traffic of float32, and finer than any threshold.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

PROBABILITY_ONE = 65535


def quantise(probability: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """The nearest whole numbers; `PROBABILITY_ONE` is 1."""
    return jnp.round(probability * PROBABILITY_ONE).astype(jnp.uint16)
