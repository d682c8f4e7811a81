"""Endless streams of images in closed form: uniform, class-aware, full-class batches, mixtures.

A stream holds no state that moves: any of its places can be asked for at any time, on any host, and
the answer is the same. So a resumed run sees the batches of an uninterrupted one, and the hosts of
a pod slice one global batch instead of agreeing on it.

Shape legend: B slots of a batch, n places of a stream, K classes with at least one image, P pairs
(class, image containing it).
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64

from common.data.plans.permutation import (
    CLASS_IMAGES,
    IMAGES,
    OTHER_IMAGES,
    ROUNDS,
    SLOTS,
    permute,
    slots_of,
    stream_key,
)

DENOMINATOR = 10**6  # of shares
SHARES = 10**6  # that `ClassPlan.own` counts in


class Drawn(NamedTuple):
    """What was drawn for some slots.

    Attributes:
      images: image indices.
      classes: the class each was drawn for, -1 for none.
      sources: place of the dataset among those of the run.
    """

    images: Int64[np.ndarray, " n"]
    classes: Int32[np.ndarray, " n"]
    sources: Int32[np.ndarray, " n"]


class Stream(Protocol):
    """What a batch can be drawn from."""

    def batch(self, step: int) -> Drawn:
        """The B slots of a step."""

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Drawn:
        """What lies at the given places of the endless stream."""


@dataclasses.dataclass(frozen=True)
class UniformPlan:
    """An endless stream of permutations of some images, cut into batches (which may straddle two).

    Attributes:
      images: (n,) image indices.
      seed: of the run.
      batch_size: B.
      source: their dataset.
    """

    images: Int64[np.ndarray, " n"]
    seed: int
    batch_size: int
    source: int = 0

    def batch(self, step: int) -> Drawn:
        return self.draw(slots_of(step, self.batch_size))

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Drawn:
        epoch, place = np.divmod(slots, len(self.images))
        place = permute(place, len(self.images), stream_key(self.seed, IMAGES, epoch))
        return Drawn(self.images[place], *_constant(len(slots), -1, self.source))


class ClassImages(NamedTuple):
    """Images by class.

    Attributes:
      offsets: (K + 1,) rows of `members` that belong to a class.
      members: (P,) image indices.
    """

    offsets: Int64[np.ndarray, " K+1"]
    members: Int32[np.ndarray, " P"]

    def pick(
        self,
        row: Int64[np.ndarray, " n"],
        draw: Int64[np.ndarray, " n"],
        *key: int | Int32[np.ndarray, " n"],
    ) -> Int64[np.ndarray, " n"]:
        """Element `draw` of the endless permutations, named by `key`, of the images of class
        rows."""
        size = np.diff(self.offsets)[row]
        epoch, place = np.divmod(draw, size)
        place = permute(place, size, stream_key(*key, epoch))
        return self.members[self.offsets[row] + place].astype(np.int64)


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

    A class may have two sets of images: of its draws the share `own` takes the first one, by the
    rule of `Mixture`, the others take the second.

    Attributes:
      classes: (K,) indices of the classes that have images; others are skipped.
      images: of the classes; all images of a class whose `own` is SHARES.
      seed: of the run.
      batch_size: B.
      full_rounds: f.
      source: dataset of the images.
      own: (K,) in units of 1 / SHARES; None: all.
      others: the second set of images; given with `own`.
    """

    classes: Int32[np.ndarray, " K"]
    images: ClassImages
    seed: int
    batch_size: int
    full_rounds: int = 0
    source: int = 0
    own: Int64[np.ndarray, " K"] | None = None
    others: ClassImages | None = None

    def batch(self, step: int) -> Drawn:
        num_classes = len(self.classes)
        extra = self.batch_size - self.full_rounds * num_classes
        stream, position = np.divmod(slots_of(step, extra), num_classes)
        row = self._stream_class(stream, position)
        draw = stream + (step + 1) * self.full_rounds
        if self.full_rounds:
            rows, draws = self._full_rounds(step, step * extra)
            row, draw = np.concatenate([rows, row]), np.concatenate([draws, draw])
            order = shuffled(self.batch_size, self.seed, step)
            row, draw = row[order], draw[order]
        return self._pick(row, draw)

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Drawn:
        """What lies at the given places of the stream (of a plan with f = 0)."""
        stream, position = np.divmod(slots, len(self.classes))
        return self._pick(self._stream_class(stream, position), stream)

    def _pick(self, row: Int64[np.ndarray, " n"], draw: Int64[np.ndarray, " n"]) -> Drawn:
        classes = self.classes[row]
        sources = np.full(len(row), self.source, np.int32)
        if self.own is None or self.others is None:
            images = self.images.pick(row, draw, self.seed, CLASS_IMAGES, classes)
            return Drawn(images, classes, sources)
        before, after = (d * self.own[row] // SHARES for d in (draw, draw + 1))
        own = after > before
        images = np.empty(len(row), np.int64)
        images[own] = self.images.pick(row[own], before[own], self.seed, CLASS_IMAGES, classes[own])
        images[~own] = self.others.pick(
            row[~own], (draw - before)[~own], self.seed, OTHER_IMAGES, classes[~own]
        )
        return Drawn(images, classes, sources)

    def _stream_class(self, stream_round: np.ndarray, position: np.ndarray) -> np.ndarray:
        key = stream_key(self.seed, ROUNDS, stream_round)
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
class Mixture:
    """Two streams mixed by a share: an expert's classes with background, one source with others.

    Of the endless stream of slots, slot t belongs to the first stream when floor((t + 1) p) >
    floor(t p), so any run of slots holds the share p, up to one slot. The i-th such slot takes
    place i of the first stream, the i-th other one place i of the second. The slots of a batch are
    then put into random order, so that no device gets one kind only.

    Attributes:
      first, second: the streams.
      share: p, of the first.
      seed: of the run.
      batch_size: B.
    """

    first: Stream
    second: Stream
    share: Fraction
    seed: int
    batch_size: int

    def batch(self, step: int) -> Drawn:
        order = shuffled(self.batch_size, self.seed, step)
        return self.draw(slots_of(step, self.batch_size)[order])

    def draw(self, slots: Int64[np.ndarray, " n"]) -> Drawn:
        p = self.share
        before, after = (s * p.numerator // p.denominator for s in (slots, slots + 1))
        first = after > before
        mixed = Drawn(np.empty(len(slots), np.int64), *_constant(len(slots), -1, 0))
        parts = (first, self.first, before), (~first, self.second, slots - before)
        for chosen, stream, places in parts:
            for column, values in zip(mixed, stream.draw(places[chosen]), strict=True):
                column[chosen] = values
        return mixed


def mix(streams: Sequence[tuple[Stream, Fraction]], seed: int, batch_size: int) -> Stream:
    """One stream of several, by their shares, which are positive and need not add up to 1; none
    gets less than 1 / DENOMINATOR of the slots that it divides with the next."""
    *rest, (mixed, weight) = streams
    for stream, share in reversed(rest):
        weight += share
        part = (share / weight).limit_denominator(DENOMINATOR)
        part = min(max(part, Fraction(1, DENOMINATOR)), 1 - Fraction(1, DENOMINATOR))
        mixed = Mixture(stream, mixed, part, seed, batch_size)
    return mixed


def shuffled(batch_size: int, seed: int, step: int) -> Int64[np.ndarray, " B"]:
    """A random order of the slots of a step."""
    return permute(np.arange(batch_size), batch_size, stream_key(seed, SLOTS, step))


def _constant(count: int, class_: int, source: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, class_, np.int32), np.full(count, source, np.int32)
