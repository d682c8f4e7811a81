"""Cross-entropies of logits, in float32.

Shape legend
  K1  columns that a softmax goes over
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sigmoid_cross_entropy(
    logits: Float[Array, "..."], labels: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """Binary cross-entropy of each logit."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(jnp.where(labels, -logits, logits))


def softmax_cross_entropy(
    logits: Float[Array, "... K1"], labels: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Cross-entropy of each row; labels are columns."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return -(log_probability * chosen).sum(axis=-1)
