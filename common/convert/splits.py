"""Splits of a set: those of the user's file, and images divided anew into splits of given shares.

Shape legend: N images, P pairs of an image and a class that it holds, K classes, S splits.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int32

from common.convert.annotations import Annotations, ImageTable
from common.convert.options import Options
from common.convert.report import NOTED, REPAIRED, Report
from common.data.photo_names import normal, photo_name
from common.io.errors import UserError
from common.io.json_file import read_json
from common.tables.ranges import rows_of

KINDS = ("random", "stratified", "grouped")


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


def named_splits(
    annotations: Annotations, path: Path | None, report: Report
) -> tuple[dict[str, np.ndarray], set[int]]:
    """Splits of the source with those of the user's file over them.

    Args:
      annotations: get an image for each id of the file that has no annotations.
      path: JSON file {"name": [ids]}, None = no such file.
      report: gets ids that are given twice.

    Returns:
      Split name -> image indices; and the images that are new: photos without annotations (test
      sets), which stay only where their photo is.

    Raises:
      UserError: a broken file, or a split none of whose ids is in the annotations.
    """
    splits = dict(annotations.splits)
    if path is None:
        return splits, set()
    images = annotations.images
    find = ImageFinder(images)
    first_new = len(images)
    for name, ids in _read_splits(path).items():
        members = []
        for text in map(str, ids):
            index = find(text)
            members.append(images.add(text) if index < 0 else index)
        if members and min(members) >= first_new and first_new:
            raise UserError(
                f"{path}: none of the ids of split {name!r} is in the annotations "
                f"(first {ids[0]!r}; the annotations have ids like {images.ids[0]!r})"
            )
        unique = list(dict.fromkeys(members))
        report.add("id twice in a split", REPAIRED, str(path), [name] * (len(ids) - len(unique)))
        splits[name] = np.array(unique, np.int64)
    return splits, set(range(first_new, len(images)))


class ImageFinder:
    """Finds an image by its id, its number (9 means 000000000009), or the name of its photo."""

    def __init__(self, images: ImageTable):
        self._images = images
        self._others: dict[str, int] = {}  # -1 = two images
        for i, image_id in enumerate(images.ids):
            if image_id.isdecimal():
                self._add(image_id.lstrip("0"), i)
        for i, file in images.files.items():
            for name in {normal(file), photo_name("", file)}:
                self._add(name, i)

    def _add(self, name: str, image: int) -> None:
        if self._others.setdefault(name, image) != image:
            self._others[name] = -1

    def __call__(self, text: str) -> int:
        """Index of the image, -1 = there is none."""
        index = self._images.find(text)
        if index >= 0:
            return index
        if text.isdecimal():
            index = self._others.get(text.lstrip("0"), -1)
        for name in (normal(text), photo_name("", text)) if index < 0 else ():
            index = max(index, self._images.find(name), self._others.get(name, -1))
        return index


def read_split_list(path: Path) -> list[str]:
    """Lines of a list of images, without those that are empty.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the split ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save the list as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def note_overlaps(
    splits: Mapping[str, np.ndarray], ids: Sequence[str], source: str, report: Report
) -> None:
    """Tells images that are in two splits, and those that are in none.

    A split that is all inside another, as VOC's train in trainval, is meant to be, but for equal
    ones of which one is to train on and one to judge by.
    """
    for first, second in itertools.combinations(splits, 2):
        shared = np.intersect1d(splits[first], splits[second])
        nested = len(shared) in (len(splits[first]), len(splits[second]))
        equal = len(splits[first]) == len(splits[second])
        opposed = equal and {_role(first), _role(second)} == {"train", "judge"}
        if not len(shared) or (nested and not opposed):
            continue
        report.add(
            f"in the splits {first} and {second}: a leak between them",
            NOTED,
            source,
            [ids[i] for i in shared.tolist()],
        )
    used = np.zeros(len(ids), bool)
    for members in splits.values():
        used[members] = True
    unused = np.flatnonzero(~used)
    report.add("image in no split", NOTED, source, [ids[i] for i in unused.tolist()])


def _role(split: str) -> str:
    """What a split is for, by its name."""
    judges = any(word in split.lower() for word in ("val", "test", "dev"))
    trains = "train" in split.lower()
    return "" if judges == trains else "train" if trains else "judge"


def _read_splits(path: Path) -> dict[str, list[str | int]]:
    try:
        splits = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the splits ({error.strerror})") from error
    good = isinstance(splits, dict) and all(
        isinstance(ids, list)
        and all(isinstance(i, str | int) and str(i).isprintable() for i in ids)
        for ids in splits.values()
    )
    if not good:
        raise UserError(f'{path}: expected {{"name": [ids], ...}}')
    return splits


def divided_splits(
    splits: dict[str, np.ndarray],
    options: Options,
    kept: Int[np.ndarray, " N"],
    classes: Int[np.ndarray, " M"],
    box_counts: Int[np.ndarray, " N"],
    num_classes: int,
    names: Sequence[str],
) -> dict[str, np.ndarray]:
    """Splits in which those of `options.pool` are divided anew.

    Args:
      splits: split name -> image indices.
      options: kind of the division, shares, seed and pool.
      kept: image indices of the N images that are written, ascending.
      classes: of the M boxes of these images, one image after the other.
      box_counts: number of boxes of each image.
      num_classes: K.
      names: (N) path of each image's photo, of which 'grouped' makes groups.

    Raises:
      UserError: no such splits, or a new one is called like one that stays.
    """
    pool = options.pool or list(splits)
    others = {name: images for name, images in splits.items() if name not in pool}
    if not set(pool) <= set(splits) or set(others) & set(options.shares):
        raise UserError(
            f"--pool={','.join(pool)} --shares={','.join(options.shares)}: the splits are "
            f"{', '.join(splits)}; expected to pool some of them, and new names unlike the others"
        )
    pooled = np.isin(kept, np.concatenate([splits[name] for name in pool]))
    number = np.cumsum(pooled) - 1  # of each pooled image
    shares = np.array(list(options.shares.values()))
    if options.split == "random":
        split = random_split(int(pooled.sum()), shares, options.seed)
    elif options.split == "grouped":
        groups = group_codes([names[i] for i in np.flatnonzero(pooled).tolist()], options.group)
        split = grouped_split(groups, shares, options.seed)
    else:
        rows = np.repeat(pooled, box_counts)
        image = np.repeat(number, box_counts)[rows]
        split = stratified_split(
            image, classes[rows], int(pooled.sum()), num_classes, shares, options.seed
        )
    return others | {name: kept[pooled][split == i] for i, name in enumerate(options.shares)}


def random_split(
    num_images: int, shares: Float[np.ndarray, " S"], seed: int
) -> Int32[np.ndarray, " N"]:
    """Split of each image, drawn without regard to classes; sizes are exact up to rounding."""
    split = np.repeat(np.arange(len(shares), dtype=np.int32), _apportion(num_images, shares))
    return np.random.default_rng(seed).permutation(split)


def group_codes(names: Sequence[str], pattern: str) -> Int[np.ndarray, " N"]:
    """Group of each photo: its folder, or what a regular expression finds in its path.

    Raises:
      UserError: no such expression, or one that finds nothing in a path.
    """
    try:
        search = re.compile(pattern or r"^(.*)/").search
    except re.error as error:
        raise UserError(f"--group={pattern}: no regular expression ({error})") from error
    codes: dict[str, int] = {}
    result = np.zeros(len(names), np.int64)
    for i, name in enumerate(names):
        match = search(name)
        if match is None and pattern:
            raise UserError(f"--group={pattern}: finds nothing in {name}")
        key = "" if match is None else match[1 if match.re.groups else 0] or ""
        result[i] = codes.setdefault(key, len(codes))
    return result


def grouped_split(
    groups: Int[np.ndarray, " N"], shares: Float[np.ndarray, " S"], seed: int
) -> Int32[np.ndarray, " N"]:
    """Split of each image, so that a group is in one split; groups go where most is lacking."""
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]  # large ones while there is room
    lacking = len(groups) * shares
    split = np.zeros(len(sizes), np.int32)
    for group in order:
        split[group] = np.argmax(lacking)
        lacking[split[group]] -= sizes[group]
    return split[groups]


def stratified_split(
    image: Int[np.ndarray, " P"],
    class_: Int[np.ndarray, " P"],
    num_images: int,
    num_classes: int,
    shares: Float[np.ndarray, " S"],
    seed: int,
) -> Int32[np.ndarray, " N"]:
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
    split = np.full(num_images, -1, np.int32)
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
