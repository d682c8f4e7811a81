"""Losses of class logits, in float32.

Shape legend
  B  images
  R  regions
  K  classes; logits have K + 1 columns, column 0 is background
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e9  # finite, so that 0 * logit stays 0; its exponential is exactly 0 in float32


def mask_unknown(
    logits: Float[Array, "B R K1"], class_known: Bool[Array, "B K"]
) -> Float[Array, "B R K1"]:
    """Takes classes that are unknown in an image out of the softmax of all its regions."""
    known = jnp.pad(class_known, ((0, 0), (1, 0)), constant_values=True)  # background is known
    return jnp.where(known[:, None], logits, MASKED)
