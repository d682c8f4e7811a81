"""K independent sigmoids without one for background: plain, equalized and federated.

All sum the binary cross-entropies of the classes, so that the loss of a RoI does not shrink with
K. Masked logits (classes unknown in the image) have loss and gradient 0 by themselves.

Shape legend
  B  images of this device
  R  sampled RoIs per image
  K  classes, and logits
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from common.tables.hierarchy import Ancestors, ancestor_matrix
from detection.classifiers.interface import ClassTargets, LossState, RoIClassifier, is_label
from detection.losses.classification import sigmoid_cross_entropy
from detection.losses.shares import global_sum


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1 - probability))


@dataclasses.dataclass(frozen=True)
class Sigmoid(RoIClassifier):
    """A background RoI is a negative of every class, a positive one of all others.

    With `ancestors` a positive RoI is one of the ancestors of its class too, and says nothing of
    the descendants (UniDet, Zhou et al. 2022): a box of a person may be a man.

    Attributes:
      prior: probability that every class starts with.
      ancestors: of each class; (): classes have nothing to do with one another.
    """

    prior: float
    ancestors: Ancestors = dataclasses.field(default=(), kw_only=True)
    num_leading: ClassVar[int] = 0
    has_background: ClassVar[bool] = False

    @property
    def start_bias(self) -> float:
        return logit(self.prior)

    def probabilities(self, logits: Float[Array, "... K"]) -> Float[Array, "... K+1"]:
        scores = jax.nn.sigmoid(logits)
        return jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])

    def loss(
        self,
        logits: Float[Array, "B R K"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        labels = targets.labels
        terms = sigmoid_cross_entropy(logits, self.is_positive(labels))
        counts = self.counts(targets, axis_name)
        if self.ancestors:
            counts &= ~self._relatives(ancestor_matrix(self.ancestors).T)[labels]
            if targets.known is not None:  # an ancestor of a known class need not be known
                counts &= targets.known[:, None]
        return jnp.where(counts, terms, 0.0).sum(axis=-1), state

    def is_positive(self, labels: Int[Array, "B R"]) -> Bool[Array, "B R K"]:
        """Whether a class is the label or one of its ancestors."""
        own = is_label(labels, self.num_classes)
        if not self.ancestors:
            return own
        return own | self._relatives(ancestor_matrix(self.ancestors))[labels]

    def _relatives(self, matrix: Bool[np.ndarray, "K K"]) -> Bool[Array, "K+1 K"]:
        """Rows by label; background, the first one, has none."""
        return jnp.asarray(np.pad(matrix, ((1, 0), (0, 0))))

    def counts(self, targets: ClassTargets, axis_name: str | None) -> Bool[Array, "B R K"]:
        """Which classes' terms enter the loss of a RoI; broadcasts."""
        return jnp.ones((1, 1, 1), bool)


@dataclasses.dataclass(frozen=True)
class EQL(Sigmoid):
    """Equalization loss (Tan et al. 2020, section 3.2).

    The weight of a term is 1 - E(r) T(f) (1 - y): a positive RoI is no negative of a rare class; a
    background RoI still is.

    Attributes:
      rare: (K,) classes whose share of the training photos is below the threshold.
    """

    rare: tuple[bool, ...]

    def counts(self, targets: ClassTargets, axis_name: str | None) -> Bool[Array, "B R K"]:
        background = (targets.labels == 0)[..., None]
        return background | ~jnp.array(self.rare) | self.is_positive(targets.labels)


@dataclasses.dataclass(frozen=True)
class Federated(Sigmoid):
    """Federated loss (Zhou et al. 2021): only some classes have a loss in a step.

    They are the classes of the RoIs of all devices, and others drawn without replacement, class c
    with a chance proportional to `weights[c]`, until they are `num_drawn`. An image's RoIs also are
    negatives of the classes that its image-level labels speak of.

    Attributes:
      weights: (K,) at least 0.
      num_drawn: classes of a step; more if more are annotated.
    """

    weights: tuple[float, ...]
    num_drawn: int

    def counts(self, targets: ClassTargets, axis_name: str | None) -> Bool[Array, "B R K"]:
        chosen = self.chosen(targets, axis_name)[None]
        if targets.verified is not None:
            chosen = chosen | targets.verified
        return chosen[:, None]

    def chosen(self, targets: ClassTargets, axis_name: str | None) -> Bool[Array, " K"]:
        """The classes of this step, the same on all devices."""
        of_roi = self.is_positive(targets.labels) & targets.counted[..., None]
        annotated = global_sum(of_roi.any(axis=(0, 1)).astype(jnp.int32), axis_name) > 0
        # Ordering by log(weight) + Gumbel noise is drawing one after the other.
        noise = jax.random.gumbel(targets.shared_key, (self.num_classes,))
        order = jnp.log(jnp.array(self.weights)) + noise
        order = jnp.where(annotated, jnp.inf, order)
        best, index = jax.lax.top_k(order, min(self.num_drawn, self.num_classes))
        drawn = jnp.zeros(self.num_classes, bool).at[index].set(best > -jnp.inf)
        return annotated | drawn
