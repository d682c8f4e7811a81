"""Brute-force twin of common/convert/cleaning.py: one row at a time, plain Python."""

import math

import numpy as np


def clean_rows(
    rows: list[tuple[int, int, tuple[float, float, float, float], int]],
) -> tuple[list[tuple], dict[str, int]]:
    """Remaining rows (image, class, box, flags) and reason -> count.

    Boxes must be exact in float32; -1 as class means unknown.
    """
    kept, seen, reasons = [], set(), {}

    def count(reason: str) -> None:
        reasons[reason] = reasons.get(reason, 0) + 1

    for image, class_, box, flags in rows:
        xmin, ymin, xmax, ymax = box
        if not all(math.isfinite(x) for x in box):
            count("number missing or not finite")
        elif class_ < 0:
            count("unknown class")
        elif xmax <= xmin or ymax <= ymin:
            count("zero area")
        elif xmax <= 0 or ymax <= 0 or xmin >= 1 or ymin >= 1:
            count("outside the frame")
        else:
            if min(box) < -1e-3 or max(box) > 1 + 1e-3:
                count("reaches outside the frame")
            clipped = tuple(float(np.float32(min(max(x, 0.0), 1.0))) for x in box)
            row = (image, class_, clipped, flags)
            if row in seen:
                count("duplicate row")
            else:
                seen.add(row)
                kept.append(row)
    return kept, reasons
