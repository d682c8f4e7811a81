"""The weakly supervised head: scores of proposals that image-level labels suffice to learn.

WSDDN (Bilen and Vedaldi 2016), with the refinement classifiers of OICR (Tang et al. 2017): paper
section 5.7.

Shape legend
  B  images
  P  proposals per image
  N  proposals of all images, D their features
  K  classes
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from detection.losses.weak import mil_scores
from detection.models.box_head import CLASSIFIER_INIT, dense_layers
from detection.structures import Pool


class WeakOutput(NamedTuple):
    """What the head says of the proposals of a batch.

    Attributes:
      scores: of the two streams, summing over an image's proposals to at most 1 a class.
      log_presence: logarithm of that sum, the probability that a class is on the image.
      refined: logits of each refinement, column 0 background.
    """

    scores: Float[Array, "B P K"]
    log_presence: Float[Array, "B K"]
    refined: tuple[Float[Array, "B P K+1"], ...]

    def best_scores(self) -> Float[Array, "B P K"]:
        """What boxes are mined by, cut off from the gradient: refined scores where there are."""
        scores = self.scores
        if self.refined:
            probabilities = [jax.nn.softmax(x)[..., 1:] for x in self.refined]
            scores = jnp.mean(jnp.stack(probabilities), axis=0)
        return jax.lax.stop_gradient(scores)


class WeakHead(nn.Module):
    """Two fully connected layers, then a class stream, a proposal stream, and refinements.

    Attributes:
      num_classes: K.
      class_stream: "softmax" or "sigmoid" over the classes of a proposal.
      width: of the fully connected layers.
      refinements: how many.
      feature_gradient: share of the gradient that goes on to the features, 0 to 1.
    """

    num_classes: int
    class_stream: str
    width: int
    refinements: int
    feature_gradient: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pool: Pool, boxes: Float[Array, "B P 4"], valid: Bool[Array, "B P"]
    ) -> WeakOutput:
        """Proposals that are not `valid` have scores 0 and change no others."""
        num_images, num_proposals = valid.shape
        x = pool(boxes).reshape(num_images * num_proposals, -1)
        if self.feature_gradient < 1:
            fixed = jax.lax.stop_gradient(x)
            x = fixed + self.feature_gradient * (x - fixed) if self.feature_gradient else fixed
        x = dense_layers(x, self.width, self.dtype)

        def logits(name: str, outputs: int) -> Array:
            stream = Stream(outputs, self.dtype, name=name)
            return stream(x).reshape(num_images, num_proposals, outputs)

        scores, log_presence = mil_scores(
            logits("class_stream", self.num_classes),
            logits("proposal_stream", self.num_classes),
            valid,
            self.class_stream,
        )
        refined = tuple(
            logits(f"refinement{number + 1}", self.num_classes + 1)
            for number in range(self.refinements)
        )
        return WeakOutput(scores, log_presence, refined)


class Stream(nn.Module):
    """A layer `classifier`, the name by which fine-tuning knows outputs of classes."""

    outputs: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N outputs"]:
        dense = nn.Dense(
            self.outputs, dtype=self.dtype, kernel_init=CLASSIFIER_INIT, name="classifier"
        )
        return dense(x).astype(jnp.float32)
