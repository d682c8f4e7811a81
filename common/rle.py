"""COCO run-length masks in bulk: checking, areas and tight boxes without making pixels.

A mask is stored as the lengths of runs of equal pixels, column by column, the first run being of
zeros. Compressed `counts` write each length (from the fourth on: its difference to the length two
before) in groups of five bits, as the characters '0' to 'o'.

Shape legend: n masks, r runs of all masks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Runs below 2^31 need seven characters; longer texts would overflow 64 bits.
_MAX_CHARACTERS = 12


def decode_runs(
    counts: Sequence[bytes],
) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " n+1"], Int[np.ndarray, " n"]]:
    """Run lengths of compressed masks.

    Args:
      counts: (n,) compressed counts.

    Returns:
      runs: lengths, mask by mask; zeros and ones in turn.
      offsets: mask i has runs[offsets[i]:offsets[i + 1]].
      broken: indices of texts that are no counts; their runs mean nothing.
    """
    sizes = np.array([len(text) for text in counts], np.int64)
    data = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - 48
    mask_of = np.repeat(np.arange(len(sizes)), sizes)
    broken = np.zeros(len(sizes), bool)
    broken[mask_of[(data < 0) | (data > 63)]] = True
    text_ends = np.cumsum(sizes)
    ends = (data & 32) == 0  # the last character of a number
    last = text_ends[sizes > 0] - 1
    broken[mask_of[last[~ends[last]]]] = True
    ends[last] = True  # so that a broken text does not reach into the next one
    stops = np.flatnonzero(ends)
    starts = np.concatenate([[0], stops[:-1] + 1]) if len(stops) else stops
    place = np.arange(len(data)) - np.repeat(starts, stops - starts + 1)
    broken[mask_of[place >= _MAX_CHARACTERS]] = True
    shift = 5 * np.minimum(place, _MAX_CHARACTERS - 1)
    runs = np.add.reduceat((data & 31) << shift, starts) if len(starts) else data
    # Bit 4 of the last character is the sign.
    runs = runs - np.where(data[stops] & 16, np.int64(32) << shift[stops], 0)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(mask_of[stops], minlength=len(sizes)))])
    within = np.arange(len(runs)) - offsets[:-1][mask_of[stops]]
    for parity in (1, 2):  # lengths 1, 3, 5... and 2, 4, 6... are differences among themselves
        chain = (within >= 1) & (within % 2 == parity % 2)
        total = np.concatenate([[0], np.cumsum(np.where(chain, runs, 0))])
        summed = total[1:] - total[offsets[:-1]][mask_of[stops]]
        runs = np.where(chain, summed, runs)
    owner = mask_of[stops]
    broken[owner[runs < 0]] = True
    return runs, offsets, np.flatnonzero(broken)


def find_broken(counts: Sequence[bytes], sizes: Int[np.ndarray, "n 2"]) -> tuple[int, str] | None:
    """First mask that is no run-length code of its height and width and why, or None."""
    runs, offsets, broken = decode_runs(counts)
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    pixels = sizes[:, 0] * sizes[:, 1]
    covered = _sum(runs, offsets)
    wrong = (covered != pixels) | (sizes <= 0).any(1)
    wrong[broken] = True
    if not wrong.any():
        return None
    index = int(np.argmax(wrong))
    height, width = sizes[index]
    if (sizes[index] <= 0).any():
        return index, f"mask of size {height}x{width}, expected positive height and width"
    if index in broken:
        return index, f"counts {counts[index][:20]!r} are no compressed COCO run lengths"
    return index, (
        f"mask runs cover {covered[index]} pixels, expected height {height} x width {width} = "
        f"{pixels[index]}"
    )


def areas(counts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
    """Pixels of each mask."""
    runs, offsets, _ = decode_runs(counts)
    within = np.arange(len(runs)) - np.repeat(offsets[:-1], np.diff(offsets))
    return _sum(np.where(within % 2, runs, 0), offsets)


def tight_boxes(counts: Sequence[bytes], sizes: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 4"]:
    """Pixel box xmin, ymin, xmax, ymax (half-open) around each mask; zeros for an empty one."""
    runs, offsets, _ = decode_runs(counts)
    owner = np.repeat(np.arange(len(counts)), np.diff(offsets))
    within = np.arange(len(runs)) - offsets[:-1][owner]
    total = np.concatenate([[0], np.cumsum(runs)])
    start = total[:-1] - total[offsets[:-1]][owner]
    chosen = (within % 2 == 1) & (runs > 0)
    owner, start, stop = owner[chosen], start[chosen], (start + runs)[chosen] - 1
    height = np.maximum(np.asarray(sizes, np.int64).reshape(-1, 2)[owner, 0], 1)
    one_column = start // height == stop // height
    low = np.where(one_column, start % height, 0)
    high = np.where(one_column, stop % height, height - 1)
    boxes = np.zeros((len(counts), 4), np.int64)
    masks, first = np.unique(owner, return_index=True)
    if len(masks):
        boxes[masks, 0] = np.minimum.reduceat(start // height, first)
        boxes[masks, 1] = np.minimum.reduceat(low, first)
        boxes[masks, 2] = np.maximum.reduceat(stop // height, first) + 1
        boxes[masks, 3] = np.maximum.reduceat(high, first) + 1
    return boxes


def _sum(values: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]) -> Int[np.ndarray, " n"]:
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]


def encode_runs(runs: Sequence[int]) -> bytes:
    """Compressed counts of one mask, the reverse of `decode_runs`."""
    characters = bytearray()
    for i, length in enumerate(runs):
        value = int(length) - (int(runs[i - 2]) if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            characters.append(bits + 48 + (32 if more else 0))
    return bytes(characters)
