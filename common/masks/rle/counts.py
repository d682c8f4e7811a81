"""Compressed counts to run lengths and back; areas and tight boxes; finding broken masks.

Shape legend: n masks, r runs of all masks, s runs of ones of all masks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from common.tables.ranges import pieces

Counts = Sequence[bytes] | np.ndarray  # n texts; of an array: of objects
Sizes = Sequence[tuple[int, int]] | Int[np.ndarray, "n 2"]  # height and width of n masks

# Runs below 2^31 need seven characters; longer texts would overflow 64 bits.
_MAX_CHARACTERS = 12
_RUN_CHARACTERS = 7
_MAX_TEXT = 1 << 25  # characters of one mask
MAX_FRAME, MAX_SIDE = 1 << 29, 1 << 17  # pixels, as of a photo
_PIECE = 1 << 18  # characters looked at together: temporaries stay near the caches


def decode_runs(
    counts: Counts,
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
    goes_on = data >= 32  # bit 5: the number has more characters
    last = text_ends[sizes > 0] - 1
    if goes_on[last].any():
        wrong.append(last[goes_on[last]])
        goes_on[last] = False  # so that a broken text does not reach into the next one
    # Most numbers have one character: five bits, the highest of which is the sign.
    low = data & 31
    signed = (low ^ 16).view(np.int8) - np.int8(16)
    runs = signed.take(np.flatnonzero(~goes_on)).astype(np.int64)
    more = np.flatnonzero(goes_on)
    if len(more):
        number = more - np.arange(len(more))  # that each of these characters is of
        first = np.diff(number, prepend=-1) != 0
        begin = np.flatnonzero(first)
        characters = np.diff(begin, append=len(more))
        if characters.max() >= _MAX_CHARACTERS:
            wrong.append(more[begin[characters >= _MAX_CHARACTERS]])
            characters = np.minimum(characters, _MAX_CHARACTERS)
        these = number.take(begin)
        values = (runs.take(these) << (5 * characters)) + low.take(more.take(begin))
        if len(begin) < len(more):
            rest = np.flatnonzero(~first)  # third and later characters, of few numbers
            owner = np.searchsorted(begin, rest) - 1
            place = np.minimum(rest - begin[owner], _MAX_CHARACTERS - 1)
            np.add.at(values, owner, low[more[rest]].astype(np.int64) << (5 * place))
        runs[these] = values
    offsets = np.concatenate([[0], text_ends - np.searchsorted(more, text_ends)])
    runs = _add_differences(runs, offsets)
    broken = [np.searchsorted(text_ends, place, "right") for place in wrong]
    if len(runs) and runs.min() < 0:
        broken.append(np.searchsorted(offsets, np.flatnonzero(runs < 0), "right") - 1)
    none = np.zeros(0, np.int64)
    return runs, offsets, np.unique(np.concatenate(broken)) if broken else none


def _add_differences(
    values: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]
) -> Int[np.ndarray, " r"]:
    """Lengths from differences: numbers 1, 3, 5... and 2, 4, 6... are sums among themselves."""
    runs = np.empty_like(values)
    first = offsets[:-1]
    for parity in (0, 1):
        # Over every second number of all masks; what was summed before a mask is taken off again,
        # and with it number 0 of those masks where that is of this parity.
        sums = np.cumsum(values[parity::2])
        before = np.concatenate([[0], sums])
        edges = (offsets + 1 - parity) // 2  # numbers of this parity before each mask
        base = before[np.minimum(edges[:-1] + (first % 2 == parity), len(sums))]
        runs[parity::2] = sums - np.repeat(base, np.diff(edges))
    first = first[np.diff(offsets) > 0]
    runs[first] = values[first]
    return runs


def encode_runs(runs: Sequence[int] | Int[np.ndarray, " r"]) -> bytes:
    """Compressed counts of one mask, the reverse of `decode_runs`."""
    return encode_all(np.asarray(runs, np.int64), np.array([0, len(runs)]))[0]


def encode_all(runs: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]) -> list[bytes]:
    """Compressed counts of n masks, the reverse of `decode_runs`."""
    values = np.array(runs, np.int64)
    values[2:] -= runs[:-2]
    plain = np.add.outer(offsets[:-1], np.arange(3))  # the first three of a mask
    plain = plain[plain < offsets[1:, None]]
    values[plain] = runs[plain]
    # Five bits a character; the highest bit of the last one is the sign.
    magnitude = values ^ (values >> 63)
    longest, characters = 1, np.ones(len(values), np.int8)
    while (longer := magnitude >= 1 << (5 * longest - 1)).any():
        characters += longer
        longest += 1
    ends = np.cumsum(characters, dtype=np.int64)
    text = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    place = ends - characters
    for level in range(longest):
        follows = characters > level + 1
        bits = ((values >> (5 * level)) & 31).astype(np.uint8)
        text[place] = bits + (48 + 32 * follows.view(np.uint8))
        more = np.flatnonzero(follows)
        values, characters, place = values.take(more), characters.take(more), place.take(more) + 1
    data = text.tobytes()
    cuts = np.concatenate([[0], ends])[offsets].tolist()
    return [data[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]


def find_broken(counts: Counts, sizes: Sizes) -> tuple[int, str] | None:
    """First mask that is no run-length code of its height and width and why, or None."""
    return checked_areas(counts, sizes)[1]


def checked_areas(
    counts: Counts, sizes: Sizes
) -> tuple[Int[np.ndarray, " n"], tuple[int, str] | None]:
    """Pixels of each mask, and what `find_broken` finds; where it does, areas mean nothing."""
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    result = np.zeros(len(counts), np.int64)
    if (odd := _find_odd_frame(counts, sizes)) is not None:
        return result, odd
    for part in pieces(_lengths(counts), _PIECE):
        runs, offsets, broken = decode_runs(counts[part])
        pixels = sizes[part, 0] * sizes[part, 1]
        covered = _sum(runs, offsets)
        result[part] = _areas(runs, offsets, covered)
        wrong = (covered != pixels) | (sizes[part] <= 0).any(1)
        wrong[broken] = True
        # A run longer than the frame: sums of such may overflow to the right number.
        if len(runs) and runs.max() > pixels.min():
            owner = np.repeat(np.arange(len(pixels)), np.diff(offsets))
            wrong[owner[runs > pixels[owner]]] = True
        if wrong.any():
            local = int(np.argmax(wrong))
            index = part.start + local
            height, width = sizes[index]
            if (sizes[index] <= 0).any():
                reason = f"mask of size {height}x{width}, expected positive height and width"
            elif local in broken:
                text = bytes(counts[index][:20])
                reason = f"counts {text!r} are no compressed COCO run lengths"
            else:
                reason = (
                    f"mask runs cover {covered[local]} pixels, expected height {height} x width "
                    f"{width} = {pixels[local]}"
                )
            return result, (index, reason)
    return result, None


def max_text(sizes: Int[np.ndarray, "*n 2"]) -> Int[np.ndarray, "*n"]:
    """Characters that the counts of frames of these heights and widths can have."""
    sides = np.asarray(sizes, np.int64).clip(0, MAX_FRAME + 1)
    pixels = np.minimum(sides[..., 0] * sides[..., 1], MAX_FRAME)
    return np.minimum((pixels + 1) * _RUN_CHARACTERS, _MAX_TEXT)


def _find_odd_frame(counts: Counts, sizes: Int[np.ndarray, "n 2"]) -> tuple[int, str] | None:
    """First mask whose frame or text is too large to be decoded, and why."""
    lengths = _lengths(counts)
    sides = sizes.clip(0, MAX_FRAME + 1)
    pixels = sides[:, 0] * sides[:, 1]
    limit = max_text(sizes)
    large = (pixels > MAX_FRAME) | (sides > MAX_SIDE).any(1)
    odd = np.flatnonzero(large | ((pixels > 0) & (lengths > limit)))
    if not len(odd):
        return None
    index = int(odd[0])
    height, width = sizes[index]
    if large[index]:
        return index, (
            f"mask of {height}x{width} pixels, expected at most {MAX_FRAME} and sides of {MAX_SIDE}"
        )
    return index, (
        f"mask of {height}x{width} pixels with {lengths[index]} characters of counts, expected at "
        f"most {limit[index]}"
    )


def areas(counts: Counts) -> Int[np.ndarray, " n"]:
    """Pixels of each mask."""
    result = np.zeros(len(counts), np.int64)
    for part in pieces(_lengths(counts), _PIECE):
        runs, offsets, _ = decode_runs(counts[part])
        result[part] = _areas(runs, offsets, _sum(runs, offsets))
    return result


def _areas(
    runs: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"], covered: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    # Runs of ones less those of zeros, by signs that change from run to run.
    signs = 1 - 2 * (np.arange(len(runs)) & 1)
    less = _sum(runs * signs, offsets) * (2 * (offsets[:-1] & 1) - 1)
    return (covered + less) // 2


def tight_boxes(counts: Counts, sizes: Sizes) -> Int[np.ndarray, "n 4"]:
    """Pixel box xmin, ymin, xmax, ymax (half-open) around each mask; zeros for an empty one."""
    boxes = np.zeros((len(counts), 4), np.int64)
    heights = np.maximum(np.asarray(sizes, np.int64).reshape(-1, 2)[:, 0], 1)
    for part in pieces(_lengths(counts), _PIECE):
        owner, start, stop = ones(counts[part])
        height = heights[part][owner]
        masks, first = np.unique(owner, return_index=True)
        if not len(masks):
            continue
        rows = part.start + masks
        last = np.append(first[1:], len(owner)) - 1
        first_column, last_column = start // height, (stop - 1) // height
        low, high = start - first_column * height, stop - 1 - last_column * height
        taller = first_column != last_column
        low[taller], high[taller] = 0, height[taller] - 1
        boxes[rows, 0] = first_column[first]
        boxes[rows, 1] = np.minimum.reduceat(low, first)
        boxes[rows, 2] = last_column[last] + 1
        boxes[rows, 3] = np.maximum.reduceat(high, first) + 1
    return boxes


def ones(
    counts: Counts,
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """Mask, first pixel and pixel after the last of every run of ones, pixels column by column."""
    runs, offsets, _ = decode_runs(counts)
    lengths = np.diff(offsets)
    total = np.concatenate([[0], np.cumsum(runs)])
    total_before = np.repeat(total[offsets[:-1]], lengths)
    of_ones = np.arange(len(runs)) & 1 == 1
    of_ones ^= np.repeat(offsets[:-1] % 2 == 1, lengths)
    chosen = np.flatnonzero(of_ones & (runs > 0))
    owner = np.repeat(np.arange(len(lengths)), lengths).take(chosen)
    base = total_before.take(chosen)
    return owner, total.take(chosen) - base, total.take(chosen + 1) - base


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


def _lengths(counts: Counts) -> Int[np.ndarray, " n"]:
    return np.fromiter(map(len, counts), np.int64, len(counts))


def _sum(values: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " n+1"]) -> Int[np.ndarray, " n"]:
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]
