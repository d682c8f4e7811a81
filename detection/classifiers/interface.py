"""What a box head's class logits mean: their columns, their loss, their probabilities.

A `RoIClassifier` is all that heads, losses, cascades and inference know of it. It is a frozen
dataclass, so that Linen modules can hold it and compiled programs are found again.

Shape legend
  B  images of this device
  R  RoIs per image: sampled ones in training
  K  classes
  L  logits: `num_leading` columns of the classifier's own, then one a class
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A masked logit: finite, so that 0 * logit stays 0; its exponential is exactly 0 in float32.
MASKED = -1e9

LossState = dict[str, Array]  # what a loss keeps from one step to the next


class ClassTargets(NamedTuple):
    """What the class logits of sampled RoIs should become.

    Attributes:
      labels: 0 background, class + 1 otherwise.
      counted: RoIs of real images that were sampled.
      keys: (B,) random keys, one an image.
      shared_key: random key of the step, the same on all devices.
      known: classes of which the source of an image says something; None: all of them.
      verified: classes that an image-level label says to be present or absent; None: unrecorded.
    """

    labels: Int[Array, "B R"]
    counted: Bool[Array, "B R"]
    keys: Array
    shared_key: Array
    known: Bool[Array, "B K"] | None = None
    verified: Bool[Array, "B K"] | None = None

    @property
    def maybe_unknown(self) -> Bool[Array, "B R"] | None:
        """Background RoIs that may hold an object of a class unknown in their image."""
        if self.known is None:
            return None
        return (self.labels == 0) & ~self.known.all(axis=-1)[:, None]


@dataclasses.dataclass(frozen=True)
class RoIClassifier(abc.ABC):
    """How a head with K classes classifies.

    Attributes:
      num_classes: K.
      num_leading: logits before those of the classes.
      has_background: column 0 of `probabilities` is that of background; otherwise it is zeros.
    """

    num_classes: int
    num_leading: ClassVar[int] = 1
    has_background: ClassVar[bool] = True

    @property
    def num_logits(self) -> int:
        return self.num_leading + self.num_classes

    @property
    def start_bias(self) -> float:
        """Of all logits, before the first step."""
        return 0.0

    def best_class(self, logits: Float[Array, "B R L"]) -> Int[Array, "B R"]:
        """The best class of each RoI, background apart."""
        return logits[..., self.num_leading :].argmax(axis=-1)

    def mask_unknown(
        self, logits: Float[Array, "B R L"], known: Bool[Array, "B K"]
    ) -> Float[Array, "B R L"]:
        """Takes classes that are unknown in an image out of the logits of all its RoIs.

        They then have probability 0, and neither their logits nor what these are made of get a
        gradient: a RoI of that image is no negative of such a class.
        """
        columns = jnp.pad(known, ((0, 0), (self.num_leading, 0)), constant_values=True)
        return jnp.where(columns[:, None], logits, MASKED)

    def start_state(self) -> LossState:
        """What the loss keeps, before the first step; {} for most."""
        return {}

    def prediction(self, logits: Float[Array, "B R L"]) -> Int[Array, "B R"]:
        """0 where background is likeliest, else the likeliest class + 1."""
        return self.probabilities(logits).argmax(axis=-1)

    @abc.abstractmethod
    def probabilities(self, logits: Float[Array, "... L"]) -> Float[Array, "... K+1"]:
        """Score of each class behind column 0, which is background's; not necessarily a softmax."""

    @abc.abstractmethod
    def loss(
        self,
        logits: Float[Array, "B R L"],
        targets: ClassTargets,
        state: LossState,
        axis_name: str | None,
    ) -> tuple[Float[Array, "B R"], LossState]:
        """The loss of each RoI and the state after this step.

        Args:
          logits: masked where classes are unknown.
          targets: of the RoIs.
          state: before this step.
          axis_name: device axis over which states are summed; they stay equal on all devices.
        """


def is_label(labels: Int[Array, "B R"], num_classes: int) -> Bool[Array, "B R K"]:
    """Whether a class is the label; no class is that of background."""
    return labels[..., None] == jnp.arange(1, num_classes + 1)
