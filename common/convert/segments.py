"""One segmentation of a COCO file: what can be drawn of it, and what is wrong with the rest.

Shape legend: p points of a polygon.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from common.masks import rle

# Reasons for the report.
FEW_POINTS = "polygon with fewer than 3 points"
FAR = "polygon far outside the photo"
EMPTY = "empty mask"
UNCOVERED = "run lengths that do not cover their frame"

_MAX_PIXELS = 1 << 28  # of a mask's frame
_FAR = 1e6  # pixels, where the size of the photo is unknown


def clean_segmentation(value: Any, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """Polygons of three points or more, or run lengths that cover their frame.

    Args:
      value: `segmentation` of an annotation.
      size: height and width of the photo, 0 = unknown.

    Returns:
      The mask, None where nothing of it is left; and what was wrong.

    Raises:
      ValueError, TypeError: it is neither polygons nor run lengths.
    """
    if value is None or value in ("", {}):
        return None, []
    if isinstance(value, dict):
        return _clean_run_lengths(value)
    if not isinstance(value, list):
        raise ValueError(f"segmentation {value!r:.60}, expected polygons or size and counts")
    if value and not isinstance(value[0], list):
        value = [value]  # one polygon without a list around it
    wrong = []
    far = np.array([2 * side if side else _FAR for side in size[::-1]])
    polygons = []
    for polygon in value:
        points = _points(polygon)
        if points is None:
            wrong.append(FEW_POINTS)
            continue
        if (np.abs(points) > far).any():
            wrong.append(FAR)
            polygon = np.clip(points, 0, far / (2 if all(size) else 1)).reshape(-1).tolist()
        polygons.append(polygon)
    if not polygons:
        wrong.append(EMPTY)
    return polygons or None, list(dict.fromkeys(wrong))


def box_of(mask: Any) -> list[float]:
    """Box x, y, width, height around what `clean_segmentation` gave, in pixels."""
    if isinstance(mask, list):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
        return [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]
    xmin, ymin, xmax, ymax = rle.tight_boxes([_counts(mask)], [mask["size"]])[0].tolist()
    return [xmin, ymin, xmax - xmin, ymax - ymin]


def _counts(mask: dict[str, Any]) -> bytes:
    counts = mask["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else rle.encode_runs(counts)


def _clean_run_lengths(mask: dict[str, Any]) -> tuple[Any, list[str]]:
    if not {"size", "counts"} <= mask.keys():
        raise ValueError(f"segmentation with {', '.join(mask)}, expected size and counts")
    height, width = mask["size"]
    if not (_is_side(height) and _is_side(width)) or height * width > _MAX_PIXELS:
        return None, [UNCOVERED]
    try:
        counts = _counts(mask)
        if rle.find_broken([counts], [(height, width)]) is not None:
            return None, [UNCOVERED]
    except (TypeError, ValueError, OverflowError):
        return None, [UNCOVERED]
    return (mask, []) if rle.areas([counts])[0] else (None, [EMPTY])


def _points(polygon: Any) -> Float[np.ndarray, "p 2"] | None:
    """The points of x, y, x, y, ...; None where they are too few."""
    try:
        numbers = np.array(polygon)
    except (ValueError, OverflowError) as error:  # of ragged lists
        raise ValueError(f"segmentation {polygon!r:.60}, expected lists of coordinates") from error
    if not isinstance(polygon, list) or numbers.ndim != 1 or numbers.dtype.kind not in "if":
        raise ValueError(f"segmentation {polygon!r:.60}, expected lists of coordinates")
    if len(numbers) % 2 or len(numbers) < 6:
        return None
    if not np.isfinite(numbers).all():
        raise ValueError("segmentation with numbers that are not finite")
    return numbers.reshape(-1, 2)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
