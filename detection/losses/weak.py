"""Scores and losses of the weakly supervised head (WSDDN, OICR).

Shape legend
  B  images
  P  proposals per image
  K  classes
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detection.classifiers.interface import MASKED
from detection.losses.classification import softmax_cross_entropy
from detection.losses.shares import share

_CLOSE_TO_ONE = 1 - 1e-6  # largest probability of which a class that is absent is accused


def mil_scores(
    class_logits: Float[Array, "B P K"],
    proposal_logits: Float[Array, "B P K"],
    valid: Bool[Array, "B P"],
    class_stream: str,
) -> tuple[Float[Array, "B P K"], Float[Array, "B K"]]:
    """What a proposal is, times which proposal it is: WSDDN, equations 3 to 5.

    Args:
      class_logits: turned into probabilities over the classes of a proposal (`class_stream`
        "softmax") or of each class ("sigmoid").
      proposal_logits: a softmax over the valid proposals of an image, for each class.
      valid: proposals that are real.
      class_stream: see above.

    Returns:
      scores, 0 where not `valid`, and the logarithm of their sum over an image's proposals, which
      is finite also where no proposal is.
    """
    if class_stream == "softmax":
        log_class = jax.nn.log_softmax(class_logits, axis=-1)
    else:
        log_class = jax.nn.log_sigmoid(class_logits)
    there = valid[..., None]
    log_place = jax.nn.log_softmax(jnp.where(there, proposal_logits, MASKED), axis=1)
    log_scores = jnp.where(there, log_class + log_place, MASKED)
    return jnp.exp(log_scores), jax.nn.logsumexp(log_scores, axis=1)


def presence_loss(
    log_presence: Float[Array, "B K"],
    present: Bool[Array, "B K"],
    verified: Bool[Array, "B K"],
    counted: Bool[Array, " B"],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of what is on an image: sum over its verified classes, mean over images.

    Of a present class it is computed from the logarithm, so that it has a gradient however small
    the probability is.

    Args:
      log_presence: from `mil_scores`.
      present: of the verified classes.
      verified: classes that are known to be present or absent; the others have no loss.
      counted: images of the mean.
      axis_name: device axis over which images are counted.
    """
    absent = verified & ~present
    probability = jnp.exp(jnp.where(absent, log_presence, MASKED))
    accused = -jnp.log1p(-jnp.minimum(probability, _CLOSE_TO_ONE))
    terms = jnp.where(present & verified, -log_presence, 0.0) + jnp.where(absent, accused, 0.0)
    return share(terms.sum(axis=-1), counted, counted.sum(), axis_name)


def refinement_loss(
    logits: Float[Array, "B P K+1"],
    labels: Int[Array, "B P"],
    weights: Float[Array, "B P"],
    counted: Bool[Array, "B P"],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Weighted softmax cross-entropy, mean over the counted proposals (OICR, equation 4).

    Args:
      logits: column 0 background.
      labels: 0 background, class + 1 otherwise.
      weights: of the proposals; those of the mean that are 0 have no loss.
      counted: proposals of the mean.
      axis_name: device axis over which proposals are counted.
    """
    values = weights * softmax_cross_entropy(logits, labels)
    return share(values, counted, counted.sum(), axis_name)
