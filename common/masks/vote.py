"""Several opinions on each pixel, one mask (paper 8.4).

    mean  foreground where the mean probability is above the threshold
    hard  foreground where most voters' own probability is above it; where the votes are even,
          which happens with four voters, the mean probability decides

Shapes: V maps, H W pixels of a box.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Rule = Literal["mean", "hard"]


def combine(
    probabilities: Float[np.ndarray, "V H W"],
    rule: Rule,
    threshold: float,
    weights: Sequence[int] | None = None,
) -> Bool[np.ndarray, "H W"]:
    """The mask that the voters agree on.

    Args:
      probabilities: of foreground, by voter.
      rule: see the head of the module.
      threshold: that a probability must exceed; a mean that decides a tie may equal it.
      weights: how many voters each map is the mean of; only for 'mean'.
    """
    if len(probabilities) == 1:
        return probabilities[0] > threshold
    mean = np.average(probabilities, axis=0, weights=weights)
    if rule == "mean":
        return mean > threshold
    votes = 2 * np.count_nonzero(probabilities > threshold, axis=0)
    voters = len(probabilities)
    return (votes > voters) | ((votes == voters) & (mean >= threshold))
