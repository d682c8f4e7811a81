"""Losses of a two-stage detector, in float32, each reduced to one number over the global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def weighted_mean(values: Float[Array, "..."], weights: Array) -> Float[Array, ""]:
    """Sum of `values` where `weights` says so, over the sum of weights (0 when nothing counts)."""
    weights = weights.astype(jnp.float32)
    # `where` before the product: a padded slot may hold inf, and inf * 0 is NaN.
    total = jnp.where(weights > 0, values * weights, 0.0).sum()
    return total / jnp.maximum(weights.sum(), 1.0)


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
