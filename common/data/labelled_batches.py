"""Batches of labelled photos for classification: read, decode, random crop and flip.

Every image of a step is a pure function of (seed, step, slot), as in `common.data.input`.

A batch is a dictionary (b: images of this host, S: image_size):
  image        uint8 (b, S, S, 3)  RGB
  label        int32 (b,)          of images with one class each; else
  labels       int8  (b, K)        1 present, -1 verified absent, 0 unknown
  image_index  int32 (b,)          -1 in the padding of the last batch
  image_valid  bool  (b,)          False: padding
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from common.data import images, placement
from common.data.batches import Batches, Example, Fields, generator, local_batch
from common.data.labelled_images import LabelledImages
from common.data.photo_errors import PhotoErrors
from common.data.plans.streams import ClassImages, ClassPlan, Stream, UniformPlan
from common.data.settings import LabelledDataSettings
from common.io.errors import UserError

_TRAIN = 2  # stream of random numbers; 0 and 1 are those of `common.data.input`
_TRIES = 10  # random crops until one fits into the photo


def train_batches(
    source: LabelledImages,
    data: LabelledDataSettings,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of the steps start_step ... start_step + num_steps - 1, drawn by the sampler.

    'uniform' draws from permutations of `source`, 'class_aware' as that of detectors does.

    Args:
      source: training images.
      data: of the run; `image_size` is S.
      seed: of permutations, crops and flips.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.

    Raises:
      UserError: bad config; while iterating: a photo that cannot be read.
    """
    local = local_batch(data.batch_size, process_index, process_count)
    plan = _plan(source, data, seed)
    size = data.image_size

    def slot(number: int) -> _Slot:
        step, place = divmod(number, local)
        place += process_index * local
        drawn = plan.draw(np.array([step * data.batch_size + place]))
        rng = generator(seed, _TRAIN, step, place)
        crop = functools.partial(random_crop, size=size, data=data, rng=rng)
        return _Slot(int(drawn.images[0]), crop)

    numbers = range(start_step * local, (start_step + num_steps) * local)
    return _batches(source, slot, numbers, local, data)


def _plan(source: LabelledImages, data: LabelledDataSettings, seed: int) -> Stream:
    if data.sampler == "uniform":
        return UniformPlan(np.arange(len(source)), seed, data.batch_size)
    images, classes = source.shown()
    if not len(classes):
        raise UserError(
            f"{source.name(0)} and {len(source) - 1} other photos: none shows a class, sampler "
            "'class_aware' draws photos by classes: use sampler 'uniform'"
        )
    counts = np.bincount(classes)
    present = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[present])])
    members = images[np.argsort(classes, kind="stable")].astype(np.int32)
    by_class = ClassImages(offsets, members)
    return ClassPlan(present.astype(np.int32), by_class, seed, data.batch_size)


def eval_batches(
    source: LabelledImages,
    data: LabelledDataSettings,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Each image once, in order: the middle of the photo, `eval_crop` of its short side.

    Host p gets images [p b, (p + 1) b) of each batch; the last one is padded.
    """
    local = local_batch(batch_size, process_index, process_count)
    crop = functools.partial(centre_crop, size=data.image_size, share=data.eval_crop)

    def slot(number: int) -> _Slot:
        batch, place = divmod(number, local)
        index = batch * batch_size + process_index * local + place
        return _Slot(index if index < len(source) else -1, crop)

    numbers = range(-(-len(source) // batch_size) * local)
    return _batches(source, slot, numbers, local, data)


def random_crop(
    shape: tuple[int, int], size: int, data: LabelledDataSettings, rng: np.random.Generator
) -> placement.Geometry:
    """A crop of random area and aspect (Szegedy et al. 2015), resized to size x size.

    Where no crop of ten fits into the photo, its middle with the nearest allowed aspect is taken.
    """
    height, width = shape
    coin = rng.random()
    low, high = (math.log(aspect) for aspect in data.crop_aspect)
    for _ in range(_TRIES):
        area = rng.uniform(*data.crop_area) * height * width
        aspect = math.exp(rng.uniform(low, high))
        h, w = math.sqrt(area / aspect), math.sqrt(area * aspect)
        if h <= height and w <= width:
            top, left = rng.random() * (height - h), rng.random() * (width - w)
            break
    else:
        aspect = min(max(width / height, data.crop_aspect[0]), data.crop_aspect[1])
        h, w = min(height, width / aspect), min(width, height * aspect)
        top, left = (height - h) / 2, (width - w) / 2
    return _crop(shape, (top, left, h, w), size, flip=data.flip and coin < 0.5)


def centre_crop(shape: tuple[int, int], size: int, share: float) -> placement.Geometry:
    """The middle square, `share` of the short side, resized to size x size."""
    side = share * min(shape)
    top, left = ((length - side) / 2 for length in shape)
    return _crop(shape, (top, left, side, side), size, flip=False)


def _crop(shape, window, size, *, flip) -> placement.Geometry:
    top, left, h, w = window
    # Whole pixels of the resized photo; `Geometry` has no others.
    full = (max(size, round(shape[0] * size / h)), max(size, round(shape[1] * size / w)))
    offset = (
        min(round(top * size / h), full[0] - size),
        min(round(left * size / w), full[1] - size),
    )
    return placement.Geometry(full, offset, (size, size), flip)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Image (-1: padding) and which part of a photo of given height, width is taken."""

    index: int
    place: Callable[[tuple[int, int]], placement.Geometry]


class _LabelledLoader:
    """Makes examples of slots; every photo must be readable."""

    def __init__(self, source: LabelledImages, size: int):
        self.photo_errors = PhotoErrors("fatal")
        self._source, several = source, source.verified
        self._label = "labels" if several else "label"
        self._fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "image": ((size, size, 3), np.uint8),
            self._label: ((len(source.class_names),), np.int8) if several else ((), np.int32),
            "image_index": ((), np.int32),
            "image_valid": ((), np.bool_),
        }

    def fields(self, slot: _Slot) -> Fields:
        return self._fields

    def load(self, slot: _Slot, example: Example) -> None:
        example["image_index"][()] = slot.index
        if slot.index < 0:
            return
        try:
            data, example[self._label][...] = self._source.read(slot.index)
            photo = images.open_photo(data)
            example["image"][:] = placement.draw_content(photo, slot.place(photo.size))
        except images.ImageError as error:
            raise UserError(
                f"{self._source.name(slot.index)}: cannot read the image: {error}"
            ) from error
        example["image_valid"][()] = True


def _batches(
    source: LabelledImages,
    slot: Callable[[int], _Slot],
    numbers: range,
    batch_size: int,
    data: LabelledDataSettings,
) -> Batches:
    return Batches(
        _LabelledLoader(source, data.image_size),
        slot,
        numbers,
        batch_size,
        processes=1 if data.tfds else data.num_processes,
        num_threads=data.num_threads,
        prefetch=data.prefetch,
    )
