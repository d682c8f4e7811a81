"""COCO run-length masks in bulk, most of it without making pixels.

A mask is stored as the lengths of runs of equal pixels, column by column, the first run being of
zeros. Compressed `counts` write each length (from the fourth on: its difference to the length two
before) in groups of five bits, as the characters '0' to 'o'.
"""

from common.masks.rle.counts import (
    Counts,
    areas,
    checked_areas,
    decode_runs,
    encode_all,
    encode_runs,
    find_broken,
    max_text,
    tight_boxes,
)
from common.masks.rle.pixels import decode, decode_all, encode, encode_window, encode_windows
from common.masks.rle.sets import iou, merge, nearest, resize

__all__ = [
    "Counts",
    "areas",
    "checked_areas",
    "decode",
    "decode_all",
    "decode_runs",
    "encode",
    "encode_all",
    "encode_runs",
    "encode_window",
    "encode_windows",
    "find_broken",
    "iou",
    "max_text",
    "merge",
    "nearest",
    "resize",
    "tight_boxes",
]
