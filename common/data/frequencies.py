"""How frequent classes are among training photos, for losses and samplers of long-tailed data.

Shape legend: n images of a source, K classes of the run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from common.data.plans.class_index import annotated_images
from common.data.sources import Source
from common.io.errors import UserError


class ClassFrequencies(NamedTuple):
    """Of all classes of a run; hashable, so that compiled programs can depend on it.

    Attributes:
      images: how many photos have at least one annotated object of a class.
      shares: of the photos with at least one annotation (of any class) whose source knows the
        class. LVIS v0.5 has 56,740 of these, of 57,263 training photos.
    """

    images: tuple[int, ...]
    shares: tuple[float, ...]

    def summary(self, threshold: float) -> str:
        """A line about them for the start of a run."""
        below = sum(share < threshold for share in self.shares)
        return (
            f"{below} of {len(self.shares)} classes are on less than {threshold:g} of the "
            f"annotated photos, {self.images.count(0)} on none"
        )


def class_frequencies(sources: Sequence[Source], ignore_flags: int = 0) -> ClassFrequencies:
    """Counts the photos of each class over all sources together.

    Args:
      sources: of the run.
      ignore_flags: boxes with any of these bits do not count.

    Raises:
      UserError: no source has boxes.
    """
    if not sources:
        raise UserError(
            "config.data.sources: none has boxes, expected some: the class frequencies that the "
            "classifier or the sampler of the config needs are counted on them"
        )
    num_classes = sources[0].num_classes
    images, looked_at = np.zeros((2, num_classes), np.int64)
    for source in sources:
        annotated = np.int64(0)
        for _, place, classes in annotated_images(source, ignore_flags):
            images += np.bincount(classes, minlength=num_classes)
            annotated += (np.diff(place, prepend=-1) > 0).sum()
        looked_at += annotated * source.known
    shares = images / np.maximum(looked_at, 1)
    return ClassFrequencies(tuple(images.tolist()), tuple(shares.tolist()))


def repeat_factors(
    source: Source, frequencies: ClassFrequencies, threshold: float, ignore_flags: int = 0
) -> Float64[np.ndarray, " n"]:
    """How often each image is drawn in an epoch, on average (Gupta et al. 2019, section 5).

    The largest max(1, sqrt(threshold / share)) of the classes that an image has; 1 without any.
    """
    shares = np.array(frequencies.shares)
    of_class = np.sqrt(threshold / np.where(shares > 0, shares, np.inf))
    of_class = np.maximum(1.0, of_class)
    factors = np.ones(len(source.images))
    for first, place, classes in annotated_images(source, ignore_flags):
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        if len(starts):
            factors[first + place[starts]] = np.maximum.reduceat(of_class[classes], starts)
    return factors
