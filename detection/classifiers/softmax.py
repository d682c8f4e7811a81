"""One softmax over background and K classes, and its equalized form.

Shape legend
  B  images of this device
  R  sampled RoIs per image
  K  classes; logits have K + 1 columns, column 0 is background
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from detection.classifiers.interface import MASKED, ClassTargets, LossState, RoIClassifier, is_label
from detection.losses.classification import softmax_cross_entropy


@dataclasses.dataclass(frozen=True)
class Softmax(RoIClassifier):
    """Softmax cross-entropy, as in Faster R-CNN."""

    def probabilities(self, logits: Float[Array, "... K+1"]) -> Float[Array, "... K+1"]:
        return jax.nn.softmax(logits)

    def prediction(self, logits: Float[Array, "B R K+1"]) -> Int[Array, "B R"]:
        return logits.argmax(axis=-1)

    def loss(
        self,
        logits: Float[Array, "B R K+1"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        return softmax_cross_entropy(logits, targets.labels), state


@dataclasses.dataclass(frozen=True)
class SoftmaxEQL(Softmax):
    """Softmax equalization loss (Tan et al. 2020, section 3.3).

    In the denominator of a positive RoI's softmax each rare class other than its label is left out
    with probability gamma, drawn anew for each RoI and class. As in the sigmoid form, background
    RoIs are negatives of every class.

    Attributes:
      rare: (K,) classes whose share of the training photos is below the threshold.
      gamma: probability.
    """

    rare: tuple[bool, ...]
    gamma: float

    def loss(
        self,
        logits: Float[Array, "B R K+1"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        labels = targets.labels
        shape = (labels.shape[1], self.num_classes)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, self.gamma, shape))(targets.keys)
        dropped &= jnp.array(self.rare) & (labels > 0)[..., None]
        dropped &= ~is_label(labels, self.num_classes)
        dropped = jnp.pad(dropped, ((0, 0), (0, 0), (1, 0)))
        return softmax_cross_entropy(jnp.where(dropped, MASKED, logits), labels), state
