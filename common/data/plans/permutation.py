"""Random numbers and permutations in closed form: pure functions of their keys, NumPy only.

Nothing is shuffled in memory: a place in a permutation of millions of images is computed directly,
in O(batch) time, so that any step of a run can be asked for at any time on any host.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_ROUNDS = 48  # of the swap-or-not shuffle
_MAX_SIZE = 1 << 32  # of a permutation
# Streams of random numbers, so that no two uses share a key.
IMAGES, _, CLASS_IMAGES, ROUNDS, SLOTS, PORTRAIT, SCALES, OTHER_IMAGES, SOURCE, REPEATS = range(10)
KINDS, LABEL_STEPS = range(10, 12)


def permute(
    position: Int64[np.ndarray, " B"],
    size: int | Int64[np.ndarray, " B"],
    key: UInt64[np.ndarray, " B"] | UInt64[np.ndarray, " 1"],
) -> Int64[np.ndarray, " B"]:
    """Element `position` of the pseudo-random permutation of range(size) that `key` names.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012, "An enciphering scheme based on a card
    shuffle"): exact on domains of any size, no table, each element on its own.

    Args:
      position: 0 <= position < size.
      size: one for all or one per element, below 2^32.
      key: likewise; elements of equal key and size belong to the same permutation.
    """
    size = np.asarray(size, np.uint64)
    if np.any(size >= _MAX_SIZE):
        raise ValueError("permutations of 2^32 elements and more are not supported")
    half = np.uint64(32)
    round_constants = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _WEYL
    x = np.asarray(position).astype(np.uint64)
    for number in range(_ROUNDS):
        round_key = _mix(key + round_constants[number])
        offset = ((round_key >> half) * size) >> half  # uniform in [0, size)
        partner = offset + size - x
        partner = np.where(partner >= size, partner - size, partner)
        both = np.maximum(x, partner)
        swap = _mix(both ^ round_key) >> np.uint64(63) == 1
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit key from integers (arrays broadcast)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        # Arrays also for single numbers: NumPy warns when a scalar wraps around.
        key = _mix((key + _WEYL) ^ _mix(np.atleast_1d(part).astype(np.uint64) + _WEYL))
    return key


def uniforms(count: int, *parts: int | np.ndarray) -> Float64[np.ndarray, "B count"]:
    """`count` uniform random numbers in [0, 1) for each element of the key's parts."""
    words = [stream_key(*parts, number) >> np.uint64(11) for number in range(count)]
    return np.stack(words, axis=1) * 2.0**-53


def slots_of(step: int, batch_size: int) -> Int64[np.ndarray, " B"]:
    """Places in an endless stream that is cut into batches."""
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
