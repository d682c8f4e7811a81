"""How far photos and crops are turned: more for classes of long objects (paper section 5.3).

Shape legend: n photos, crops or classes.
"""

import numpy as np
from jaxtyping import Float

_MAX_DEVIATIONS = 3.0
# Standard deviation of the angle of a class by the median aspect of its boxes.
_ASPECTS, _DEGREES = (2.0, 6.0), (5.0, 30.0)


def rotation_deviations(aspects: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Standard deviations of the angles, in radians, for median aspects (long over short side).

    "Larger rotated variance for classes with severely unbalanced aspect ratio": 5 degrees up to
    2, 30 degrees from 6 on, linear between.
    """
    return np.radians(np.interp(aspects, _ASPECTS, _DEGREES))


def turn_angles(
    deviations: Float[np.ndarray, " n"], draws: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, " n"]:
    """Normally distributed angles, in radians, of at most three deviations.

    Args:
      deviations: standard deviations; 0 does not turn.
      draws: random numbers in [0, 1).
    """
    # Box and Muller's way from uniform to normal numbers.
    normal = np.sqrt(-2 * np.log1p(-draws[:, 0])) * np.cos(2 * np.pi * draws[:, 1])
    return np.clip(normal, -_MAX_DEVIATIONS, _MAX_DEVIATIONS) * deviations
