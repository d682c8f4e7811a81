"""Losses of a two-stage detector, in float32.

A reduced loss is this device's share: its sum over its own images, divided by a count taken over
all devices of `axis_name`. Shares add up to the loss of the global batch, their gradients to its
gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def global_sum(x: Array, axis_name: str | None) -> Array:
    """Sum over the devices of `axis_name`; `x` itself outside of a device axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def share(
    values: Float[Array, "..."], wanted: Bool[Array, "..."], count: Array, axis_name: str | None
) -> Float[Array, ""]:
    """This device's share of the mean: sum of `values` where `wanted`, over the global `count`."""
    count = jnp.maximum(global_sum(count, axis_name), 1)
    return jnp.where(wanted, values, 0.0).sum() / count


def smooth_l1(error: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """Huber-like loss: quadratic below `beta`, linear above; beta 0 is L1."""
    size = jnp.abs(error)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def sigmoid_cross_entropy(
    logits: Float[Array, "..."], labels: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """Binary cross-entropy of each logit."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(jnp.where(labels, -logits, logits))


def softmax_cross_entropy(
    logits: Float[Array, "... K1"], labels: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Cross-entropy of each row; label 0 is background."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return -(log_probability * chosen).sum(axis=-1)
