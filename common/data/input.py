"""Batches for training and evaluation: plan -> tf.data (read, decode, augment, pad) -> NumPy.

Every image of a step is a pure function of (seed, step, slot), so a resumed run gets the batches of
an uninterrupted one and the slices of the hosts put together are the batch of a single host.
Annotations are looked up in the memory-mapped index image by image; nothing is copied ahead.

A batch is a dictionary (b: images of this host, M: data.max_boxes, H, W: canvas padded up):
  image          uint8   (b, H, W, 3)  RGB, content top left, padding 0 (the model normalises)
  image_size     float32 (b, 2)        height, width of the content on the canvas
  original_size  int32   (b, 2)        height, width of the photo as displayed (after EXIF rotation)
  boxes          float32 (b, M, 4)     xmin, ymin, xmax, ymax in canvas pixels
  classes        int32   (b, M)
  group_of       bool    (b, M)
  valid          bool    (b, M)        which boxes are real
  image_index    int32   (b,)          row of the dataset, -1 in the padding of the last batch
  image_valid    bool    (b,)          False: padding, or a photo that could not be read
  drawn_class    int32   (b,)          the class that the plan drew the image for, -1: none
"""

import atexit
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from common.data.dataset import Dataset
from common.data.examples import DTYPES, ExampleLoader, Settings, Slot
from common.data.plan import Plan
from common.errors import UserError

# TensorFlow only reads here; left alone it would take the memory of the accelerators.
for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

_TRAIN, _EVAL = 0, 1  # streams of random numbers


def train_batches(
    dataset: Dataset,
    plan: Plan,
    data_config: Any,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Iterates over the batches of steps start_step ... start_step + num_steps - 1.

    Args:
      dataset: opened dataset directory.
      plan: from `common.data.plan.make_plan`; its batch_size is that of all hosts together.
      data_config: ConfigDict with the fields
        canvas: (height, width) that photos are fitted into, see `images.fit`.
        pad_multiple: the canvas is padded up to multiples of it.
        max_boxes: M. Of an image with more, a random subset (another one each time) is used, with
          a box of the class that the image was drawn for.
        flip: mirror half of the images left to right.
        scale_jitter: (min, max) of a uniform factor on the fitted size; above 1 crops at random.
        group_of: 'ordinary': group-of boxes are boxes, marked in group_of; 'drop': left out.
        on_image_error: what a photo that cannot be read does. 'fatal': stops with an error naming
          it; 'skip': leaves an empty slot, image_valid False, and prints the file once.
        num_threads: 0: twice as many as there are cores, at most 64.
        prefetch: batches made ahead.
      seed: of flips, scales and box subsets.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.

    Raises:
      UserError: bad config; while iterating: a photo that cannot be read (unless 'skip').
    """
    local = _local_batch(plan.batch_size, process_index, process_count)
    planned = _StepMemo(plan.batch)

    def slot(number: int) -> Slot:
        step, place = divmod(number, local)
        place += process_index * local
        image_indices, drawn_classes = planned(step)
        rng = _generator(seed, _TRAIN, step, place)
        return Slot(int(image_indices[place]), int(drawn_classes[place]), rng)

    numbers = range(start_step * local, (start_step + num_steps) * local)
    return Batches(dataset, Settings.of(data_config), slot, numbers, local)


def eval_batches(
    dataset: Dataset,
    split: str,
    data_config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Iterates once over a split, in its order, without augmentation.

    Host p gets images [p b, (p + 1) b) of each global batch: every image is on exactly one host,
    all hosts make the same number of batches (`num_batches`), and what the last one lacks is
    padded with image_index -1, image_valid False. The boxes are limited to max_boxes as in
    training; metrics take the truth from the dataset instead.

    Args and errors: as `train_batches`; batch_size counts the images of all hosts together.
    """
    local = _local_batch(batch_size, process_index, process_count)
    settings = dataclasses.replace(Settings.of(data_config), flip=False, scale_jitter=(1.0, 1.0))
    images = dataset.split(split)

    def slot(number: int) -> Slot:
        batch, place = divmod(number, local)
        position = batch * batch_size + process_index * local + place
        index = int(images[position]) if position < len(images) else -1
        return Slot(index, -1, _generator(0, _EVAL, 0, position))

    num_batches = -(-len(images) // batch_size)
    return Batches(dataset, settings, slot, range(num_batches * local), local)


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over host-local batches; arrays are read-only.

    Attributes:
      num_batches: how many there are in all.
    """

    _open: weakref.WeakSet["Batches"] = weakref.WeakSet()

    def __init__(
        self,
        dataset: Dataset,
        settings: Settings,
        slot: Callable[[int], Slot],
        numbers: range,
        batch_size: int,
    ):
        self.num_batches = len(numbers) // batch_size
        self._numbers = numbers
        self._batch_size = batch_size
        self._made = 0
        self._slot = slot
        self._loader = ExampleLoader(dataset, settings)
        self._errors: dict[int, Exception] = {}
        # More threads than cores: they also wait for files and for the interpreter lock.
        threads = settings.num_threads or min(2 * (os.cpu_count() or 1), 64)
        options = tf.data.Options()
        options.deterministic = True
        # Every number is given. The tuning thread would hold up the end of an iterator: up to a
        # minute each.
        options.autotune.enabled = False
        options.threading.private_threadpool_size = threads + 1
        self._iterator = (
            tf.data.Dataset.range(numbers.start, numbers.stop)
            .map(self._example, num_parallel_calls=threads)
            .batch(batch_size, drop_remainder=True)
            .prefetch(settings.prefetch)
            .with_options(options)
            .as_numpy_iterator()
        )
        self._open.add(self)

    def close(self) -> None:
        """Stops reading ahead. After the last batch and at exit this happens by itself.

        A thread of tf.data that waits for Python when the interpreter has gone never ends, and the
        iterator, deleted so late, would wait for it.
        """
        self._iterator = iter(())

    @classmethod
    def close_all(cls) -> None:
        for batches in list(cls._open):
            batches.close()

    @property
    def skipped_images(self) -> int:
        """Photos left out so far because they cannot be read (those of prefetched batches too)."""
        return self._loader.photo_errors.skipped

    @property
    def dropped_boxes(self) -> int:
        """Boxes so far that did not fit into max_boxes (those of prefetched batches too)."""
        return self._loader.dropped_boxes

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator, None)
        if batch is None:
            self.close()
            raise StopIteration
        self._made += 1
        end = self._numbers.start + self._made * self._batch_size
        errors = [number for number in list(self._errors) if number < end]
        if errors:
            raise self._errors[min(errors)]
        return batch

    def _example(self, number: tf.Tensor) -> dict[str, tf.Tensor]:
        # numpy_function costs the interpreter lock, but Pillow gives it back while it works.
        values = tf.numpy_function(self._load, [number], list(DTYPES.values()))
        shapes = self._loader.shapes
        for name, value in zip(DTYPES, values, strict=True):
            value.set_shape(shapes[name])
        return dict(zip(DTYPES, values, strict=True))

    def _load(self, number: np.int64) -> list[np.ndarray]:
        try:
            example = self._loader.load(self._slot(int(number)))
        except Exception as error:
            # Raised by `__next__` when its batch comes: TensorFlow would print it and pass on text.
            self._errors[int(number)] = error
            example = self._loader.empty()
        return [example[name] for name in DTYPES]


atexit.register(Batches.close_all)


class _StepMemo:
    """Keeps the plan of the latest steps: all slots of a step ask for it, from several threads."""

    _STEPS = 64

    def __init__(self, function: Callable[[int], Any]):
        self._function = function
        self._results: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> Any:
        with self._lock:
            if step not in self._results:
                while len(self._results) >= self._STEPS:
                    del self._results[next(iter(self._results))]
                self._results[step] = self._function(step)
            return self._results[step]


def _generator(seed: int, stream: int, step: int, slot: int) -> np.random.Generator:
    """Random numbers of a slot: a counter-based generator put at (step, slot), without history."""
    key = np.array([seed % 2**64, stream], np.uint64)
    counter = np.array([0, 0, slot, step], np.uint64)  # drawing moves the first word
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: expected a positive multiple of {process_count}, "
            "the number of hosts"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    return batch_size // process_count
