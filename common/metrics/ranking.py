"""Average precision of image-level classification, by verified labels.

Shape legend: n images, K classes.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int8


def average_precision(scores: Float[np.ndarray, " n"], present: Bool[np.ndarray, " n"]) -> float:
    """Mean over the present images of the precision among all that score at least as high.

    Nothing is interpolated; NaN where no image is present.
    """
    if not present.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, sorted_scores = present[order], -scores[order]
    # Equal scores have no order: each is as far down as the last of them.
    last = np.searchsorted(sorted_scores, sorted_scores[ranked], side="right")
    return float(np.mean(np.cumsum(ranked)[last - 1] / last))


def class_average_precisions(
    scores: Float[np.ndarray, "n K"], labels: Int8[np.ndarray, "n K"]
) -> Float64[np.ndarray, " K"]:
    """Of each class over the images on which it was verified; NaN where none shows it, or where all
    do, so that any scores would be perfect.

    Args:
      scores: of the images.
      labels: 1 present, -1 absent, 0 unknown.
    """
    verified, is_absent = np.not_equal(labels, 0), np.less(labels, 0)
    return np.array(
        [
            average_precision(scores[verified[:, k], k], labels[verified[:, k], k] > 0)
            if is_absent[:, k].any()
            else np.nan
            for k in range(scores.shape[1])
        ]
    )
