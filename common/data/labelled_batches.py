"""Batches of labelled photos for classification: read, decode, random crop and flip.

Every image of a step is a pure function of (seed, step, slot), as in `common.data.input`.

A batch is a dictionary (b: images of this host, S: image_size):
  image        uint8 (b, S, S, 3)  RGB
  label        int32 (b,)
  image_index  int32 (b,)          -1 in the padding of the last batch
  image_valid  bool  (b,)          False: padding
"""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common.data import images
from common.data.labelled_images import LabelledImages
from common.data.plan import UniformPlan
from common.io.errors import UserError

_TRAIN = 2  # stream of random numbers; 0 and 1 are those of `common.data.input`
_TRIES = 10  # random crops until one fits into the photo

Example = dict[str, np.ndarray]


def train_batches(
    source: LabelledImages,
    data_config: Any,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Example]:
    """Batches of the steps start_step ... start_step + num_steps - 1 from permutations of `source`.

    Args:
      source: training images.
      data_config: ConfigDict with the fields
        batch_size: images of all hosts together.
        image_size: S.
        crop_area: (min, max) of a random crop's share of the photo's area.
        crop_aspect: (min, max) of its width over height.
        flip: mirror half of the images left to right.
        num_threads: 0: twice as many as there are cores, at most 64.
        prefetch: batches made ahead.
      seed: of permutations, crops and flips.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.

    Raises:
      UserError: bad config; while iterating: a photo that cannot be read.
    """
    _check(data_config, process_count)
    plan = UniformPlan(np.arange(len(source)), seed, data_config.batch_size)
    local = data_config.batch_size // process_count
    size = data_config.image_size

    def load(number: int) -> Example:
        step, place = divmod(number, local)
        place += process_index * local
        index = int(plan.draw(np.array([step * data_config.batch_size + place]))[0])
        key = np.array([seed % 2**64, _TRAIN], np.uint64)
        counter = np.array([0, 0, place, step], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return _example(
            source, index, size, lambda shape: random_crop(shape, size, data_config, rng)
        )

    numbers = range(start_step * local, (start_step + num_steps) * local)
    return _in_batches(load, numbers, local, data_config)


def eval_batches(
    source: LabelledImages,
    data_config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Example]:
    """Each image once, in order: the middle of the photo, `eval_crop` of its short side.

    Host p gets images [p b, (p + 1) b) of each batch; the last one is padded.
    """
    _check(data_config, process_count, batch_size)
    local = batch_size // process_count
    size = data_config.image_size

    def load(number: int) -> Example:
        batch, place = divmod(number, local)
        index = batch * batch_size + process_index * local + place
        if index >= len(source):
            return _padding(size)
        return _example(
            source, index, size, lambda shape: centre_crop(shape, size, data_config.eval_crop)
        )

    numbers = range(-(-len(source) // batch_size) * local)
    return _in_batches(load, numbers, local, data_config)


def random_crop(
    shape: tuple[int, int], size: int, config: Any, rng: np.random.Generator
) -> images.Geometry:
    """A crop of random area and aspect (Szegedy et al. 2015), resized to size x size.

    Where no crop of ten fits into the photo, its middle with the nearest allowed aspect is taken.
    """
    height, width = shape
    coin = rng.random()
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    for _ in range(_TRIES):
        area = rng.uniform(*config.crop_area) * height * width
        aspect = math.exp(rng.uniform(low, high))
        h, w = math.sqrt(area / aspect), math.sqrt(area * aspect)
        if h <= height and w <= width:
            top, left = rng.random() * (height - h), rng.random() * (width - w)
            break
    else:
        aspect = min(max(width / height, config.crop_aspect[0]), config.crop_aspect[1])
        h, w = min(height, width / aspect), min(width, height * aspect)
        top, left = (height - h) / 2, (width - w) / 2
    return _crop(shape, (top, left, h, w), size, flip=config.flip and coin < 0.5)


def centre_crop(shape: tuple[int, int], size: int, share: float) -> images.Geometry:
    """The middle square, `share` of the short side, resized to size x size."""
    side = share * min(shape)
    top, left = ((length - side) / 2 for length in shape)
    return _crop(shape, (top, left, side, side), size, flip=False)


def _crop(shape, window, size, *, flip) -> images.Geometry:
    top, left, h, w = window
    # Whole pixels of the resized photo; `Geometry` has no others.
    full = (max(size, round(shape[0] * size / h)), max(size, round(shape[1] * size / w)))
    offset = (
        min(round(top * size / h), full[0] - size),
        min(round(left * size / w), full[1] - size),
    )
    return images.Geometry(full, offset, (size, size), flip)


def _example(
    source: LabelledImages,
    index: int,
    size: int,
    place: Callable[[tuple[int, int]], images.Geometry],
) -> Example:
    try:
        data, label = source.read(index)
        photo = images.open_photo(data)
        pixels = images.draw(photo, place(photo.size), (size, size))
    except images.ImageError as error:
        raise UserError(f"{source.name(index)}: cannot read the image: {error}") from error
    return {
        "image": pixels,
        "label": np.int32(label),
        "image_index": np.int32(index),
        "image_valid": np.True_,
    }


def _padding(size: int) -> Example:
    return {
        "image": np.zeros((size, size, 3), np.uint8),
        "label": np.int32(0),
        "image_index": np.int32(-1),
        "image_valid": np.False_,
    }


def _in_batches(load: Callable[[int], Example], numbers: range, local: int, config: Any):
    """Loads examples in threads, some batches ahead; order and content do not depend on them."""
    threads = config.num_threads or min(2 * (os.cpu_count() or 1), 64)
    ahead = (config.prefetch + 1) * local
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    # Pillow gives the interpreter lock back while it decodes and resizes.
    pool = concurrent.futures.ThreadPoolExecutor(threads, "images")
    try:
        remaining = iter(numbers)
        for _ in range(len(numbers) // local):
            while len(pending) < ahead and (number := next(remaining, None)) is not None:
                pending.append(pool.submit(load, number))
            examples = [pending.popleft().result() for _ in range(local)]
            yield {name: np.stack([e[name] for e in examples]) for name in examples[0]}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check(config: Any, process_count: int, batch_size: int | None = None) -> None:
    batch_size = config.batch_size if batch_size is None else batch_size
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: expected a positive multiple of {process_count}, "
            "the number of hosts"
        )
    requirements = {
        "image_size": (config.image_size >= 1, "at least 1"),
        "crop_area": (0 < config.crop_area[0] <= config.crop_area[1] <= 1, "0 < min <= max <= 1"),
        "crop_aspect": (0 < config.crop_aspect[0] <= config.crop_aspect[1], "0 < min <= max"),
        "eval_crop": (0 < config.eval_crop <= 1, "more than 0, at most 1"),
        "num_threads": (config.num_threads >= 0, "0 (automatic) or more"),
        "prefetch": (config.prefetch >= 1, "at least 1"),
    }
    for field, (holds, expected) in requirements.items():
        if not holds:
            raise UserError(f"data.{field} is {getattr(config, field)!r}: expected {expected}")
