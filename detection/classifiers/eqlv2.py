"""Equalization loss v2 (Tan et al. 2021): positives and negatives weighted by gradient sums.

Shape legend
  B  images of this device
  R  sampled RoIs per image
  K  classes; logits have K + 1 columns, column 0 is background
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from detection.classifiers.interface import ClassTargets, LossState, RoIClassifier, is_label
from detection.classifiers.sigmoid import logit
from detection.losses.classification import sigmoid_cross_entropy
from detection.losses.shares import global_sum

_START_RATIO = 100.0  # of a class without gradients so far: its weights are 1


@dataclasses.dataclass(frozen=True)
class EQLv2(RoIClassifier):
    """K + 1 sigmoids, with weights that balance what pulls a class up and down.

    With g the ratio of the sums of the positive and of the negative gradients of a class over all
    earlier steps, a negative weighs 1 / (1 + exp(-gamma (g - mu))) and a positive
    1 + alpha (1 - that); background weighs 1. The score of a class is its probability times that of
    no background.

    Attributes:
      prior: probability that every sigmoid starts with.
      gamma, mu, alpha: constants of the weights.
    """

    prior: float
    gamma: float
    mu: float
    alpha: float

    @property
    def start_bias(self) -> float:
        return logit(self.prior)

    def start_state(self) -> LossState:
        zeros = jnp.zeros(self.num_classes, jnp.float32)
        return {"positive_gradient": zeros, "negative_gradient": zeros}

    def probabilities(self, logits: Float[Array, "... K+1"]) -> Float[Array, "... K+1"]:
        scores = jax.nn.sigmoid(logits)
        background = scores[..., :1]
        return jnp.concatenate([background, scores[..., 1:] * (1 - background)], axis=-1)

    def loss(
        self,
        logits: Float[Array, "B R K+1"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        background, classes = logits[..., 0], logits[..., 1:]
        positive, negative = self.weights(state)
        is_own = is_label(targets.labels, self.num_classes)
        weights = jnp.where(is_own, positive, negative)
        terms = (weights * sigmoid_cross_entropy(classes, is_own)).sum(axis=-1)
        objectness = sigmoid_cross_entropy(background, targets.labels == 0)
        if targets.maybe_unknown is not None:
            objectness = jnp.where(targets.maybe_unknown, 0.0, objectness)

        scores = jax.nn.sigmoid(jax.lax.stop_gradient(classes))
        counted = targets.counted[..., None]

        def total(chosen, gradient):
            summed = jnp.where(chosen & counted, weights * gradient, 0.0).sum(axis=(0, 1))
            return global_sum(summed, axis_name)

        state = {
            "positive_gradient": state["positive_gradient"] + total(is_own, 1 - scores),
            "negative_gradient": state["negative_gradient"] + total(~is_own, scores),
        }
        return terms + objectness, state

    def weights(self, state: LossState) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
        """Of the positives and of the negatives of each class."""
        up, down = state["positive_gradient"], state["negative_gradient"]
        seen = down > 0
        ratio = jnp.where(seen, up / jnp.where(seen, down, 1.0), _START_RATIO)
        negative = jax.nn.sigmoid(self.gamma * (ratio - self.mu))
        return 1 + self.alpha * (1 - negative), negative
