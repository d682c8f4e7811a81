"""Seesaw loss (Wang et al. 2021): a softmax over classes in which rare ones are pushed down less.

Shape legend
  B  images of this device
  R  sampled RoIs per image
  K  classes; logits have 2 + K columns: background, object, then the classes
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from detection.classifiers.interface import ClassTargets, LossState, RoIClassifier, is_label
from detection.losses.classification import softmax_cross_entropy
from detection.losses.shares import global_sum


@dataclasses.dataclass(frozen=True)
class Seesaw(RoIClassifier):
    """Object or background for all RoIs, and one softmax over the classes for positive ones.

    For label i, the logit of class j gets log(M C): M = min(1, N_j / N_i)^p by how many RoIs of a
    class were sampled so far, this step included; C = max(1, p_j / p_i)^q by the probabilities of
    the RoI. The score of a class is its probability times that of an object.

    Attributes:
      p, q: exponents.
      floor: of p_i in the ratio.
    """

    p: float
    q: float
    floor: float
    num_leading: ClassVar[int] = 2

    def start_state(self) -> LossState:
        return {"counts": jnp.zeros(self.num_classes, jnp.float32)}

    def probabilities(self, logits: Float[Array, "... K+2"]) -> Float[Array, "... K+1"]:
        background, is_object = jnp.split(jax.nn.softmax(logits[..., :2]), 2, axis=-1)
        return jnp.concatenate([background, jax.nn.softmax(logits[..., 2:]) * is_object], axis=-1)

    def loss(
        self,
        logits: Float[Array, "B R K+2"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        labels, classes = targets.labels, logits[..., 2:]
        is_own = is_label(labels, self.num_classes)
        sampled = (is_own & targets.counted[..., None]).sum(axis=(0, 1)).astype(jnp.float32)
        counts = state["counts"] + global_sum(sampled, axis_name)

        def own(values):  # of the label's class; 0 for background
            return jnp.where(is_own, values, 0.0).sum(axis=-1, keepdims=True)

        log_counts = jnp.log(jnp.maximum(counts, 1.0))
        mitigation = self.p * jnp.minimum(0.0, log_counts - own(log_counts))
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(classes))
        own_log_p = jnp.maximum(own(log_p), jnp.log(self.floor))
        compensation = self.q * jnp.maximum(0.0, log_p - own_log_p)
        shifted = classes + jnp.where(is_own, 0.0, mitigation + compensation)
        by_class = softmax_cross_entropy(shifted, jnp.maximum(labels - 1, 0))
        objectness = softmax_cross_entropy(logits[..., :2], (labels > 0).astype(jnp.int32))
        if targets.maybe_unknown is not None:
            objectness = jnp.where(targets.maybe_unknown, 0.0, objectness)
        return objectness + jnp.where(labels > 0, by_class, 0.0), {"counts": counts}
