"""Cross-entropies of logits, in float32.

Shape legend
  B  images
  R  RoIs per image
  K  classes; logits have K + 1 columns, column 0 is background
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A masked logit: finite, so that 0 * logit stays 0; its exponential is exactly 0 in float32.
MASKED = -1e9


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


def mask_unknown(
    logits: Float[Array, "B R K1"], class_known: Bool[Array, "B K"]
) -> Float[Array, "B R K1"]:
    """Takes classes that are unknown in an image out of the softmax of all its RoIs."""
    known = jnp.pad(class_known, ((0, 0), (1, 0)), constant_values=True)  # background is known
    return jnp.where(known[:, None], logits, MASKED)
