"""Rows that belong to a list of ranges: joins over flat arrays with offsets.

Shape legend: n ranges, m rows of all of them.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def expand_ranges(
    starts: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The rows starts[i] ... starts[i] + counts[i] - 1 of all ranges one after the other.

    Returns:
      owner: range that each row belongs to, non-decreasing.
      rows: row numbers.
    """
    starts, counts = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    shift = starts - (np.cumsum(counts) - counts)
    return owner, np.arange(len(owner)) + shift[owner]


def rows_of(
    offsets: Int[np.ndarray, " N+1"], indices: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Position in `indices` and row number of all rows that belong to the given images.

    Args:
      offsets: such as `Dataset.box_offsets`; may be memory-mapped.
      indices: images.
    """
    starts = np.asarray(offsets[indices], np.int64)
    return expand_ranges(starts, np.asarray(offsets[indices + 1], np.int64) - starts)


def pieces(counts: Int[np.ndarray, " n"], limit: int) -> Iterator[slice]:
    """Cuts n elements into runs whose counts sum to at most `limit` (or that hold one element)."""
    ends = np.cumsum(counts, dtype=np.int64)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, "right")), start + 1)
        yield slice(start, stop)
        start = stop
