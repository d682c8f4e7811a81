"""The mechanics of batches: numbered slots -> tf.data (loaded by several threads) -> NumPy.

A loader makes the example of a slot; which slot a number stands for is the caller's. So batches
resume at any number, and hosts share a global batch by taking other numbers.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from common.data.examples import PhotoErrors
from common.io.errors import UserError

# TensorFlow only reads here; left alone it would take the memory of the accelerators.
for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)


class Loader(Protocol):
    """Makes examples of slots; threads share it.

    Attributes:
      photo_errors: counts the unreadable photos that were left out.
      dtypes: of the fields of an example.
    """

    photo_errors: PhotoErrors
    dtypes: Mapping[str, Any]

    @property
    def shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        """Shape of each field; None where batches differ (the slots of one batch do not)."""

    def load(self, slot: Any) -> dict[str, np.ndarray]:
        """The example of a slot."""

    def empty(self, slot: Any | None) -> dict[str, np.ndarray]:
        """An example of all padding, of the shapes that `load` returns for the slot (None: of one
        that could not be told)."""


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over host-local batches; arrays are read-only.

    Attributes:
      num_batches: how many there are in all.
    """

    _open: weakref.WeakSet["Batches"] = weakref.WeakSet()

    def __init__(
        self,
        loader: Loader,
        slot: Callable[[int], Any],
        numbers: range,
        batch_size: int,
        *,
        num_threads: int,
        prefetch: int,
    ):
        """Starts reading.

        Args:
          loader: makes the examples.
          slot: what the loader is to make of a number.
          numbers: of all slots, batch after batch.
          batch_size: slots of a batch on this host.
          num_threads: 0: twice as many as there are cores, at most 64.
          prefetch: batches made ahead.
        """
        self.num_batches = len(numbers) // batch_size
        self._numbers = numbers
        self._batch_size = batch_size
        self._made = 0
        self._slot = slot
        self._loader = loader
        self._errors: dict[int, Exception] = {}
        # More threads than cores: they also wait for files and for the interpreter lock.
        threads = num_threads or min(2 * (os.cpu_count() or 1), 64)
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
            .prefetch(prefetch)
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
        dtypes, shapes = self._loader.dtypes, self._loader.shapes
        values = tf.numpy_function(self._load, [number], list(dtypes.values()))
        for name, value in zip(dtypes, values, strict=True):
            value.set_shape(shapes[name])
        return dict(zip(dtypes, values, strict=True))

    def _load(self, number: np.int64) -> list[np.ndarray]:
        slot = None
        try:
            slot = self._slot(int(number))
            example = self._loader.load(slot)
        except Exception as error:
            # Raised by `__next__` when its batch comes: TensorFlow would print it and pass on text.
            self._errors[int(number)] = error
            example = self._loader.empty(slot)
        return [example[name] for name in self._loader.dtypes]


atexit.register(Batches.close_all)


class StepMemo:
    """Keeps the plan of the latest steps: all slots of a step ask for it, from several threads."""

    def __init__(self, function: Callable[[int], Any], size: int = 64):
        """`size`: steps kept."""
        self._function = function
        self._size = size
        self._results: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> Any:
        with self._lock:
            if step not in self._results:
                while len(self._results) >= self._size:
                    del self._results[next(iter(self._results))]
                self._results[step] = self._function(step)
            return self._results[step]


def generator(seed: int, stream: int, step: int, slot: int) -> np.random.Generator:
    """Random numbers of a slot: a counter-based generator put at (step, slot), without history."""
    key = np.array([seed % 2**64, stream], np.uint64)
    counter = np.array([0, 0, slot, step], np.uint64)  # drawing moves the first word
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: expected a positive multiple of {process_count}, "
            "the number of hosts"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    return batch_size // process_count
