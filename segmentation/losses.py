"""Softmax cross-entropy of two classes per pixel, and what goes with it.

Shapes: B crops, H W canvas.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped


def pixel_losses(
    logits: Float[Array, "B H W"], truth: Shaped[Array, "B H W"], known: Bool[Array, "B H W"]
) -> dict[str, Float[Array, " B"]]:
    """Sums over the known pixels of each crop, float32.

    Args:
      logits: foreground minus background; softmax over two logits depends on nothing else.
      truth: 0 background, anything else foreground.
      known: pixels that count.

    Returns:
      loss (cross-entropy), pixels, correct, intersection, union: of foreground, predicted where
      its probability is above one half.
    """
    logits, truth = logits.astype(jnp.float32), truth != 0
    loss = jax.nn.softplus(jnp.where(truth, -logits, logits))
    predicted = logits > 0
    sums = {
        "loss": loss * known,
        "pixels": known,
        "correct": known & (predicted == truth),
        "intersection": known & predicted & truth,
        "union": known & (predicted | truth),
    }
    return {name: jnp.sum(value, (1, 2), dtype=jnp.float32) for name, value in sums.items()}
