"""Compressed counts to run lengths and back; areas and tight boxes; finding broken masks.

Shape legend: n masks, r runs of all masks, s runs of ones of all masks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from common.ranges import pieces

# Runs below 2^31 need seven characters; longer texts would overflow 64 bits.
_MAX_CHARACTERS = 12
_PIECE = 1 << 18  # characters looked at together: temporaries stay near the caches


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
    sizes = _lengths(counts)
    data = np.frombuffer(b"".join(counts), np.uint8) - np.uint8(48)
    text_ends = np.cumsum(sizes)
    wrong = []  # characters that break their text
    if len(data) and data.max() > 63:
        wrong.append(np.flatnonzero(data > 63))
    ends = data < 32  # the last character of a number has no bit 5
    last = text_ends[sizes > 0] - 1
    if not ends[last].all():
        wrong.append(last[~ends[last]])
        ends[last] = True  # so that a broken text does not reach into the next one
    stops = np.flatnonzero(ends)
    characters = np.diff(stops, prepend=-1)
    starts = stops - characters + 1
    runs = (data[starts] & 31).astype(np.int64)
    longest = int(characters.max(initial=0))
    if longest > _MAX_CHARACTERS:
        wrong.append(stops[characters > _MAX_CHARACTERS])
    more = np.arange(len(runs))
    for place in range(1, min(longest, _MAX_CHARACTERS)):
        more = more[characters[more] > place]
        runs[more] |= (data[starts[more] + place] & 31).astype(np.int64) << (5 * place)
    negative = np.flatnonzero(data[stops] & 16)  # bit 4 of the last character is the sign
    shift = 5 * np.minimum(characters[negative], _MAX_CHARACTERS)
    runs[negative] -= np.left_shift(np.int64(1), shift)
    offsets = np.concatenate([[0], np.searchsorted(stops, text_ends)])
    runs = _add_differences(runs, offsets)
    broken = [np.searchsorted(text_ends, place, "right") for place in wrong]
    broken.append(np.searchsorted(offsets, np.flatnonzero(runs < 0), "right") - 1)
    return runs, offsets, np.unique(np.concatenate(broken))


def _add_differences(
    runs: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]
) -> Int[np.ndarray, " r"]:
    """Lengths from differences: numbers 1, 3, 5... and 2, 4, 6... are sums among themselves."""
    # Over every second number of all masks; what was summed before a mask is taken off again.
    sums = runs.copy()
    for parity in (0, 1):
        np.cumsum(sums[parity::2], out=sums[parity::2])
    padded = np.concatenate([[0, 0], sums])
    lengths = np.diff(offsets)
    # Of numbers 1, 3, 5...: the sum that ends before number 0. Of 2, 4...: the one at number 0.
    first = offsets[:-1]
    before = np.repeat(padded[np.minimum(first + 1, len(padded) - 1)], lengths)
    within_odd = (np.arange(len(runs)) - np.repeat(first, lengths)) & 1 == 1
    at_first = np.repeat(padded[np.minimum(first + 2, len(padded) - 1)], lengths)
    result = sums - np.where(within_odd, before, at_first)
    filled = first[lengths > 0]
    result[filled] = runs[filled]
    return result


def encode_runs(runs: Sequence[int]) -> bytes:
    """Compressed counts of one mask, the reverse of `decode_runs`."""
    return encode_all(np.asarray(runs, np.int64), np.array([0, len(runs)]))[0]


def encode_all(runs: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]) -> list[bytes]:
    """Compressed counts of n masks, the reverse of `decode_runs`."""
    values = np.array(runs, np.int64)
    within = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    later = np.flatnonzero(within > 2)
    values[later] -= runs[later - 2]
    # Five bits a character; the highest bit of the last one is the sign.
    magnitude = np.where(values < 0, ~values, values)
    characters = np.ones(len(values), np.int64)
    more = np.flatnonzero(magnitude >= 16)
    while len(more):
        characters[more] += 1
        more = more[(magnitude[more] >> (5 * characters[more] - 1)) > 0]
    ends = np.cumsum(characters)
    starts = ends - characters
    text = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    more, place = np.arange(len(values)), 0
    while len(more):
        follows = characters[more] > place + 1
        text[starts[more] + place] = ((values[more] >> (5 * place)) & 31) + 48 + 32 * follows
        more, place = more[follows], place + 1
    data = text.tobytes()
    cuts = np.concatenate([[0], ends])[offsets].tolist()
    return [data[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]


def find_broken(counts: Sequence[bytes], sizes: Int[np.ndarray, "n 2"]) -> tuple[int, str] | None:
    """First mask that is no run-length code of its height and width and why, or None."""
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    for part in pieces(_lengths(counts), _PIECE):
        runs, offsets, broken = decode_runs(counts[part])
        pixels = sizes[part, 0] * sizes[part, 1]
        covered = _sum(runs, offsets)
        wrong = (covered != pixels) | (sizes[part] <= 0).any(1)
        wrong[broken] = True
        if wrong.any():
            local = int(np.argmax(wrong))
            index = part.start + local
            height, width = sizes[index]
            if (sizes[index] <= 0).any():
                return index, f"mask of size {height}x{width}, expected positive height and width"
            if local in broken:
                text = bytes(counts[index][:20])
                return index, f"counts {text!r} are no compressed COCO run lengths"
            return index, (
                f"mask runs cover {covered[local]} pixels, expected height {height} x width "
                f"{width} = {pixels[local]}"
            )
    return None


def areas(counts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
    """Pixels of each mask."""
    result = np.zeros(len(counts), np.int64)
    for part in pieces(_lengths(counts), _PIECE):
        runs, offsets, _ = decode_runs(counts[part])
        within = np.arange(len(runs)) - np.repeat(offsets[:-1], np.diff(offsets))
        result[part] = _sum(np.where(within % 2, runs, 0), offsets)
    return result


def tight_boxes(counts: Sequence[bytes], sizes: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 4"]:
    """Pixel box xmin, ymin, xmax, ymax (half-open) around each mask; zeros for an empty one."""
    boxes = np.zeros((len(counts), 4), np.int64)
    heights = np.maximum(np.asarray(sizes, np.int64).reshape(-1, 2)[:, 0], 1)
    for part in pieces(_lengths(counts), _PIECE):
        owner, start, stop = ones(counts[part])
        height = heights[part][owner]
        first_column, low = np.divmod(start, height)
        last_column, high = np.divmod(stop - 1, height)
        one_column = first_column == last_column
        low = np.where(one_column, low, 0)
        high = np.where(one_column, high, height - 1)
        masks, first = np.unique(owner, return_index=True)
        if len(masks):
            rows = part.start + masks
            boxes[rows, 0] = np.minimum.reduceat(first_column, first)
            boxes[rows, 1] = np.minimum.reduceat(low, first)
            boxes[rows, 2] = np.maximum.reduceat(last_column, first) + 1
            boxes[rows, 3] = np.maximum.reduceat(high, first) + 1
    return boxes


def ones(
    counts: Sequence[bytes],
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """Mask, first pixel and pixel after the last of every run of ones, pixels column by column."""
    runs, offsets, _ = decode_runs(counts)
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    total = np.concatenate([[0], np.cumsum(runs)])
    odd = np.flatnonzero(((np.arange(len(runs)) - offsets[:-1][owner]) & 1 == 1) & (runs > 0))
    owner = owner[odd]
    base = total[offsets[:-1]][owner]
    return owner, total[odd] - base, total[odd + 1] - base


def counts_of_ones(
    owner: Int[np.ndarray, " s"],
    starts: Int[np.ndarray, " s"],
    stops: Int[np.ndarray, " s"],
    pixels: Int[np.ndarray, " n"],
) -> list[bytes]:
    """Compressed counts from runs of ones, the reverse of `ones`.

    Args:
      owner: mask of each run, non-decreasing.
      starts: first pixels, ascending within a mask.
      stops: pixels after the last; a run may begin where the one before ends.
      pixels: height * width of each mask.
    """
    joined = (owner[1:] == owner[:-1]) & (starts[1:] == stops[:-1])
    if joined.any():
        begins, ends = np.append(True, ~joined), np.append(~joined, True)
        owner, starts, stops = owner[begins], starts[begins], stops[ends]
    number = np.bincount(owner, minlength=len(pixels))
    # Where runs begin and end: 0, start, stop, ..., start, stop, pixels.
    first = np.cumsum(2 * number + 2) - (2 * number + 2)
    points = np.zeros(int((2 * number + 2).sum()), np.int64)
    place = 2 * np.arange(len(owner)) + 2 * owner + 1
    points[place], points[place + 1] = starts, stops
    points[first + 2 * number + 1] = pixels
    runs = np.diff(points)
    # No run reaches from one mask to the next, and none of zeros follows the last pixel.
    keep = np.ones(len(runs), bool)
    keep[first[1:] - 1] = False
    tail = first + 2 * number
    dropped = (runs[tail] == 0) & (number > 0)
    keep[tail[dropped]] = False
    offsets = np.concatenate([[0], np.cumsum(2 * number + 1 - dropped)])
    return encode_all(runs[keep], offsets)


def _lengths(counts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
    return np.fromiter(map(len, counts), np.int64, len(counts))


def _sum(values: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]) -> Int[np.ndarray, " n"]:
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]
