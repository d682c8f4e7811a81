"""Means over the global batch, as each device's share of them.

A reduced loss is this device's share: its sum over its own images, divided by a count taken over
all devices of `axis_name`. Shares add up to the loss of the global batch, their gradients to its
gradient. Losses are float32.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.nn.parts import sum_over_batch


def global_sum(x: Array, axis_name: str | None) -> Array:
    """Sum over the devices of `axis_name` and their parts; `x` itself outside of a device axis."""
    return sum_over_batch(x, axis_name)


def share(
    values: Float[Array, "..."], counted: Bool[Array, "..."], count: Array, axis_name: str | None
) -> Float[Array, ""]:
    """This device's share of a mean: its sum of `values` where `counted`, over the global `count`.

    Values elsewhere may be infinite or NaN; they change neither the mean nor its gradient.
    """
    count = jnp.maximum(global_sum(count, axis_name), 1)
    return jnp.where(counted, values, 0.0).sum() / count
