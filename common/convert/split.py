"""Divides images into splits of given shares, at random or so that the class distributions match.

Shape legend: N images, P pairs of an image and a class that it holds, K classes, S splits.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int8

from common.io.errors import UserError
from common.tables.ranges import rows_of

KINDS = ("random", "stratified")


def parse_shares(pairs: Sequence[str]) -> dict[str, float]:
    """Split names and their shares from texts NAME=SHARE.

    Raises:
      UserError: no such text, a name given twice, or shares that do not add up to 1.
    """
    shares: dict[str, float] = {}
    for text in pairs:
        name, _, share = text.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not name or name in shares or not 0 < value <= 1:
            raise UserError(f"--shares: {text!r}, expected NAME=SHARE with shares of 0 to 1")
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--shares: {','.join(pairs)} add up to {sum(shares.values()):g}, not 1")
    return shares


def random_split(
    num_images: int, shares: Float[np.ndarray, " S"], seed: int
) -> Int8[np.ndarray, " N"]:
    """Split of each image, drawn without regard to classes; sizes are exact up to rounding."""
    split = np.repeat(np.arange(len(shares), dtype=np.int8), _apportion(num_images, shares))
    return np.random.default_rng(seed).permutation(split)


def stratified_split(
    image: Int[np.ndarray, " P"],
    class_: Int[np.ndarray, " P"],
    num_images: int,
    num_classes: int,
    shares: Float[np.ndarray, " S"],
    seed: int,
) -> Int8[np.ndarray, " N"]:
    """Split of each image, so that the images of each class divide like the shares.

    Iterative stratification (Sechidis et al. 2011), a class at a time: the class with the fewest
    images that are not yet placed gives them to the splits that lack most images of it. A class
    with at least as many images as there are splits gets one in each, where the classes before it
    leave that possible. Images without a class even out the sizes.

    Args:
      image: of each pair; pairs may repeat.
      class_: of each pair.
      num_images: N.
      num_classes: K.
      shares: of the splits, adding up to 1.
      seed: the same gives the same splits.
    """
    rng = np.random.default_rng(seed)
    num_splits = len(shares)
    pairs = np.unique(image.astype(np.int64) * num_classes + class_)
    image, class_ = pairs // num_classes, pairs % num_classes
    offsets = np.searchsorted(image, np.arange(num_images + 1))  # pairs of each image
    by_class = image[np.argsort(class_, kind="stable")]
    left = np.bincount(class_, minlength=num_classes)  # images of each class to be placed
    ends = np.cumsum(left)
    lacking = _wanted(left, shares)
    split = np.full(num_images, -1, np.int8)
    while left.any():
        rarest = int(np.argmin(np.where(left > 0, left, num_images + 1)))
        members = by_class[ends[rarest - 1] if rarest else 0 : ends[rarest]]
        members = rng.permutation(members[split[members] < 0])
        counts = _apportion(len(members), np.maximum(lacking[rarest], 0))
        split[members] = np.repeat(np.arange(num_splits), counts)
        owner, rows = rows_of(offsets, members)
        cell = class_[rows] * num_splits + split[members[owner]]
        placed = np.bincount(cell, minlength=lacking.size).reshape(lacking.shape)
        lacking -= placed
        left -= placed.sum(1)
    rest = rng.permutation(np.flatnonzero(split < 0))
    sizes = num_images * shares - np.bincount(split[split >= 0], minlength=num_splits)
    split[rest] = np.repeat(np.arange(num_splits), _apportion(len(rest), np.maximum(sizes, 0)))
    return split


def _wanted(
    totals: Int[np.ndarray, " K"], shares: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "K S"]:
    """Images of each class that each split should get, at least one where there are enough."""
    wanted = totals[:, None] * shares
    enough = totals >= len(shares)
    wanted[enough] = np.maximum(wanted[enough], 1)
    largest = int(np.argmax(shares))
    wanted[:, largest] -= wanted.sum(1) - totals
    return wanted


def _apportion(count: int, weights: Float[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """Divides a count like the weights, in whole numbers, by largest remainders."""
    weights = weights if weights.sum() > 0 else np.ones(len(weights))
    quota = count * weights / weights.sum()
    counts = np.floor(quota).astype(np.int64)
    largest = np.argsort(counts - quota, kind="stable")[: count - counts.sum()]
    counts[largest] += 1
    return counts
