"""Which steps of a run are of image-level labels: a function of (seed, step)."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from common.data.plans.permutation import KINDS, permute, stream_key


class StepKinds(NamedTuple):
    """Steps of image-level labels among those of boxes, in rounds.

    With the share n / d every round of d steps has exactly n of them, in a random order of its own:
    whatever looks at every so many steps sees both kinds.

    Attributes:
      share: of the steps of labels, between 0 and 1.
      seed: of the run.
    """

    share: Fraction
    seed: int

    def of_step(self, step: int) -> tuple[bool, int]:
        """Whether it is one of labels, and the number of earlier steps of its kind."""
        labels, size = self.share.numerator, self.share.denominator
        rounds, place = divmod(step, size)
        order = permute(np.arange(size), size, stream_key(self.seed, KINDS, rounds))
        is_label = order < labels
        before = int(is_label[:place].sum())
        if is_label[place]:
            return True, rounds * labels + before
        return False, rounds * (size - labels) + place - before
