"""Which images make up the batch of a training step: pure functions of (seed, step), NumPy only.

A plan holds no state that moves: any step can be asked for at any time, on any host, and the answer
is the same. So a resumed run sees the batches of an uninterrupted one, and the hosts of a pod slice
one global batch instead of agreeing on it. Nothing is shuffled in memory: a position in a
permutation of millions of images is computed directly (`permute`), in O(batch) time.

Shape legend: B slots of a global batch, K classes with at least one image, n images of the split,
P pairs (class, image containing it).
"""

import dataclasses
import typing
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt64

from common.data.dataset import GROUP_OF, Dataset
from common.data.settings import DataSettings, Sampler
from common.io.errors import UserError

SAMPLERS = typing.get_args(Sampler)

_ROUNDS = 48  # of the swap-or-not shuffle
_MAX_SIZE = 1 << 32  # of a permutation
# Streams of random numbers, so that no two uses share a key.
_IMAGES, _CLASS_ROUNDS, _CLASS_IMAGES, _EXTRA_ROUNDS, _SLOTS = range(5)
_DENOMINATOR = 1000  # of the share of positive images


class Plan(Protocol):
    """What the input pipeline needs to know about a sampler."""

    batch_size: int
    steps_per_epoch: int

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int32[np.ndarray, " B"]]:
        """Image indices of a step and the class each was drawn for (-1: for none)."""


def make_plan(
    dataset: Dataset,
    split: str,
    sampler: str,
    seed: int,
    batch_size: int,
    *,
    ignore_flags: int = 0,
    positive_share: float = 0.25,
) -> "UniformPlan | ClassPlan | ExpertPlan":
    """Builds the plan of a sampler.

    Args:
      dataset: opened dataset directory.
      split: name of its split.
      sampler: 'uniform': an endless stream of permutations of the split.
        'class_aware': an endless stream of permutations of the classes; a class takes the next
        image of its own endless stream of permuted images (without replacement).
        'full_class_batch': the same, and every batch of at least K slots holds every class.
        'expert': images with boxes by class, mixed with images that have none (paper section 5.4).
      seed: of the run.
      batch_size: B, images of all hosts together.
      ignore_flags: boxes with any of these bits (`common.data.dataset.GROUP_OF`, ...) do not count
        as containing a class; pass GROUP_OF when training drops group-of boxes.
      positive_share: of the slots of 'expert', between 0 and 1; 0.25 mixes 1:3.

    Raises:
      UserError: unknown sampler or split, an empty split, a class sampler without any box, or an
        expert without images that have none.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: expected at least 1")
    images = np.asarray(dataset.split(split), np.int64)
    if not len(images):
        raise UserError(f"{dataset.directory}: split {split!r} has no images")
    if sampler == "uniform":
        return UniformPlan(images, seed, batch_size)
    classes, offsets, members = images_by_class(dataset, images, ignore_flags)
    if not len(classes):
        raise UserError(
            f"{dataset.directory}: split {split!r} has no boxes, sampler {sampler!r} draws images "
            "by the classes of their boxes: use sampler 'uniform'"
        )
    full_rounds = batch_size // len(classes) if sampler == "full_class_batch" else 0
    by_class = ClassPlan(classes, offsets, members, len(images), seed, batch_size, full_rounds)
    if sampler != "expert":
        return by_class
    share = Fraction(positive_share).limit_denominator(_DENOMINATOR)
    if not 0 < share < 1:
        raise UserError(f"positive_share {positive_share}: expected a number between 0 and 1")
    background = images[np.diff(dataset.box_offsets)[images] == 0]
    if not len(background):
        raise UserError(
            f"{dataset.directory}: all images of split {split!r} have boxes, sampler 'expert' "
            "mixes in images without: use sampler 'class_aware'"
        )
    return ExpertPlan(by_class, UniformPlan(background, seed, batch_size), share)


def train_plan(dataset: Dataset, settings: DataSettings, seed: int) -> Plan:
    """The plan of a training: which image is in which slot of which step.

    Raises:
      UserError: as `make_plan`.
    """
    return make_plan(
        dataset,
        settings.train_split,
        settings.sampler,
        seed,
        settings.batch_size,
        ignore_flags=GROUP_OF if settings.group_of == "drop" else 0,
        positive_share=settings.positive_share,
    )


@dataclasses.dataclass(frozen=True)
class UniformPlan:
    """An endless stream of permutations of the split, cut into batches (which may straddle two).

    Attributes:
      images: (n,) image indices.
      seed: of the run.
      batch_size: B.
    """

    images: Int64[np.ndarray, " n"]
    seed: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int32[np.ndarray, " B"]]:
        images = self.draw(_slots(step, self.batch_size))
        return images, np.full(self.batch_size, -1, np.int32)

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Images at the given places of the stream."""
        epoch, position = np.divmod(slots, len(self.images))
        return self.images[
            permute(position, len(self.images), stream_key(self.seed, _IMAGES, epoch))
        ]


@dataclasses.dataclass(frozen=True)
class ClassPlan:
    """Class-aware sampling in closed form (paper section 5.1).

    An endless stream of class slots is made of rounds, each a permutation of the K classes. Its
    slots [sB, (s+1)B) belong to step s, so the draw of class c in round r is exactly the r-th draw
    of c, and takes element r of c's own endless stream of permuted images.

    With `full_rounds` f > 0 (full-class batch, B >= K), each step starts with f rounds of its own
    and takes only the other B - fK slots from the stream; all B slots are then put into random
    order, so that no device gets the same part of the batch each time. A class has been drawn
    f times per earlier step plus once per earlier round of the stream: still the r-th draw takes
    element r. With B < K the full-class batch *is* the stream: K classes in ceil(K/B) steps.

    Attributes:
      classes: (K,) indices of the classes that have images; others are skipped.
      offsets: (K + 1,) rows of `members` that belong to a class.
      members: (P,) image indices.
      num_images: n, defines the epoch (as in the release: as many draws as images).
      seed: of the run.
      batch_size: B.
      full_rounds: f.
    """

    classes: Int32[np.ndarray, " K"]
    offsets: Int64[np.ndarray, " K+1"]
    members: Int32[np.ndarray, " P"]
    num_images: int
    seed: int
    batch_size: int
    full_rounds: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int32[np.ndarray, " B"]]:
        num_classes = len(self.classes)
        extra = self.batch_size - self.full_rounds * num_classes
        stream, position = np.divmod(_slots(step, extra), num_classes)
        row = self._stream_class(stream, position)
        draw = stream + (step + 1) * self.full_rounds
        if self.full_rounds:
            rows, draws = self._full_rounds(step, step * extra)
            row, draw = np.concatenate([rows, row]), np.concatenate([draws, draw])
            order = permute(
                np.arange(self.batch_size), self.batch_size, stream_key(self.seed, _SLOTS, step)
            )
            row, draw = row[order], draw[order]
        return self._images(row, draw)

    def draw(
        self, slots: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """Images and classes at the given places of the stream (of a plan with f = 0)."""
        stream, position = np.divmod(slots, len(self.classes))
        return self._images(self._stream_class(stream, position), stream)

    def _images(self, row: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images of the given draws of class rows, and the classes."""
        size = np.diff(self.offsets)[row]
        epoch, place = np.divmod(draw, size)
        place = permute(place, size, stream_key(self.seed, _CLASS_IMAGES, self.classes[row], epoch))
        return self.members[self.offsets[row] + place].astype(np.int64), self.classes[row]

    def _stream_class(self, stream_round: np.ndarray, position: np.ndarray) -> np.ndarray:
        key = stream_key(self.seed, _EXTRA_ROUNDS, stream_round)
        return permute(position, len(self.classes), key)

    def _full_rounds(self, step: int, stream_slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Class rows and draw numbers of the rounds that belong to this step alone."""
        num_classes = len(self.classes)
        # Draws that the stream gave to each class before this step.
        whole, part = divmod(stream_slots, num_classes)
        drawn = np.full(num_classes, whole + step * self.full_rounds, np.int64)
        drawn[self._stream_class(np.full(part, whole), np.arange(part))] += 1
        row, inner = np.divmod(np.arange(num_classes * self.full_rounds), self.full_rounds)
        return row, drawn[row] + inner


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """Images of an expert's classes, by class, mixed with background images (paper section 5.4).

    Of the endless stream of slots, slot t is a positive one when floor((t + 1) p) > floor(t p), so
    any run of slots holds the share p, up to one slot. The i-th positive slot takes slot i of the
    class-aware stream, the i-th other one image i of endless permutations of the background. The
    slots of a batch are then put into random order, so that no device gets one kind only.

    Attributes:
      positives: over the images with boxes.
      background: over those without.
      share: p.
    """

    positives: ClassPlan
    background: UniformPlan
    share: Fraction

    @property
    def batch_size(self) -> int:
        return self.positives.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.positives.steps_per_epoch

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int32[np.ndarray, " B"]]:
        slots = _slots(step, self.batch_size)
        order = stream_key(self.positives.seed, _SLOTS, step)
        slots = slots[permute(np.arange(len(slots)), len(slots), order)]
        p = self.share
        before, after = (s * p.numerator // p.denominator for s in (slots, slots + 1))
        positive = after > before
        images = np.empty(len(slots), np.int64)
        classes = np.full(len(slots), -1, np.int32)
        images[positive], classes[positive] = self.positives.draw(before[positive])
        images[~positive] = self.background.draw((slots - before)[~positive])
        return images, classes


class ClassHistogram(NamedTuple):
    """How often classes were seen; each array is (num_classes,) int64."""

    drawn: np.ndarray  # slots drawn for the class
    images: np.ndarray  # images that contain it
    boxes: np.ndarray  # boxes of it


def class_histogram(plan: Plan, dataset: Dataset, steps: Iterable[int]) -> ClassHistogram:
    """Realised class frequencies of some steps of a plan (all boxes of each image counted)."""
    counts = ClassHistogram(*(np.zeros(dataset.num_classes, np.int64) for _ in range(3)))
    for step in steps:
        images, drawn = plan.batch(step)
        counts.drawn[:] += np.bincount(drawn[drawn >= 0], minlength=dataset.num_classes)
        slot, classes = _boxes_of(dataset, images)
        counts.boxes[:] += np.bincount(classes, minlength=dataset.num_classes)
        once = np.unique(slot * dataset.num_classes + classes) % dataset.num_classes
        counts.images[:] += np.bincount(once, minlength=dataset.num_classes)
    return counts


def images_by_class(
    dataset: Dataset, images: Int64[np.ndarray, " n"], ignore_flags: int = 0, chunk: int = 65536
) -> tuple[Int32[np.ndarray, " K"], Int64[np.ndarray, " K+1"], Int32[np.ndarray, " P"]]:
    """Table class -> images of `images` with at least one box of it (labels as annotated).

    Returns:
      Classes that have images, ascending; their offsets into the third array; image indices, for
      each class in the order of `images`.
    """
    columns = dataset.num_classes
    found_classes, found_images = [], []
    for first in range(0, len(images), chunk):
        part = images[first : first + chunk]
        slot, classes = _boxes_of(dataset, part, ignore_flags)
        pairs = np.sort(slot * columns + classes)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique hashes, 30 times slower here
        found_classes.append((pairs % columns).astype(np.int32))
        found_images.append(part[pairs // columns].astype(np.int32))
    classes, members = np.concatenate(found_classes), np.concatenate(found_images)
    counts = np.bincount(classes, minlength=columns)
    present = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[present])]).astype(np.int64)
    return present.astype(np.int32), offsets, members[np.argsort(classes, kind="stable")]


def _boxes_of(
    dataset: Dataset, images: Int64[np.ndarray, " n"], ignore_flags: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """For all boxes of `images`: position in `images`, class index."""
    first = np.asarray(dataset.box_offsets[images])
    count = np.asarray(dataset.box_offsets[images + 1]) - first
    slot = np.repeat(np.arange(len(images)), count)
    before = np.concatenate([[0], np.cumsum(count)])[:-1]
    rows = np.arange(count.sum()) + np.repeat(first - before, count)
    classes = np.asarray(dataset.box_classes[rows])
    if ignore_flags:
        keep = np.asarray(dataset.box_flags[rows]) & ignore_flags == 0
        slot, classes = slot[keep], classes[keep]
    return slot, classes


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


def _slots(step: int, batch_size: int) -> Int64[np.ndarray, " B"]:
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
