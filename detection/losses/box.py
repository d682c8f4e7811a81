"""Losses of box deltas."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def smooth_l1(error: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """Huber-like loss: quadratic below `beta`, linear above; beta 0 is L1."""
    size = jnp.abs(error)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)
