"""The engine under all batches: numbered slots -> examples, loaded side by side -> stacked arrays.

A loader writes the example of a slot; which slot a number stands for is the caller's. So batches
resume at any number, and hosts share a global batch by taking other numbers.

Examples are loaded in threads: Pillow releases the interpreter lock while it decodes and resizes.
What it leaves to the interpreter keeps one process from loading more than some hundred photos a
second, so on machines with many cores the threads are those of several processes
(`common.data.workers`). Each example is written right into its row of the batch's arrays, which all
of them share, so nothing is copied when a batch is complete, and batches are the same bytes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from common.data import remote
from common.data.photo_errors import PhotoErrors
from common.data.workers.blocks import Block, Blocks, Fields, Layout
from common.data.workers.pool import Workers, worker_count
from common.io.errors import UserError
from common.io.parallel import map_ordered, num_threads

Example = dict[str, np.ndarray]


class Loader(Protocol):
    """Makes examples of slots; threads share it.

    It and the slots can be pickled, and an example is a function of its slot alone; what it counts
    or prints goes to sinks (`common.data.workers.sinks`).

    Attributes:
      photo_errors: counts the unreadable photos that were left out.
    """

    photo_errors: PhotoErrors

    def fields(self, slot: Any) -> Fields:
        """Shape and type of each field of an example; the same for all slots of a batch."""

    def load(self, slot: Any, example: Example) -> None:
        """Writes the example of a slot into arrays of zeros."""


class _Batch:
    """The arrays of a batch, made when the first of its examples is loaded."""

    def __init__(self, size: int):
        self.size = size
        self.arrays: Example = {}
        self._block: Block | None = None
        self._lock = threading.Lock()

    def row(self, place: int, loader: Loader, slot: Any) -> Example:
        """The arrays' views of one example."""
        with self._lock:
            if not self.arrays:
                self.arrays = {
                    name: np.zeros((self.size, *shape), dtype)
                    for name, (shape, dtype) in loader.fields(slot).items()
                }
        return {name: array[place, ...] for name, array in self.arrays.items()}

    def block(self, loader: Loader, slot: Any, blocks: Blocks) -> Block:
        """Shared memory with the arrays, taken from `blocks`."""
        with self._lock:
            if self._block is None:
                layout = Layout.of(loader.fields(slot), self.size)
                self._block, content = blocks.take(layout.nbytes)
                self.arrays = layout.arrays(content)
            return self._block


def stack_examples(
    loader: Loader,
    batches: Iterable[Sequence[Any]],
    *,
    slot: Callable[[Any], Any] = lambda item: item,
    processes: int = 1,
    threads: int,
    ahead: int,
) -> Iterator[Example]:
    """Yields the arrays of each batch, in order; they are read-only.

    Args:
      loader: makes the examples.
      batches: the items of each batch, which lie ahead of the result by `ahead` items at most.
      slot: what the loader is to make of an item; called in threads of this process.
      processes: that load examples; 1: this one.
      threads: of all of them; 0: twice as many as there are cores, at most 64 a process.
      ahead: number of examples that are loaded ahead.

    Raises:
      UserError: a process that ended, when the batch of an example that it had comes.
      Exception: what `slot` or the loader raises, when the batch of that example comes.
    """

    def tasks() -> Iterator[tuple[_Batch, int, Any]]:
        for items in batches:
            batch = _Batch(len(items))
            for place, item in enumerate(items):
                yield batch, place, item

    def load_here(task: tuple[_Batch, int, Any]) -> tuple[_Batch, int]:
        batch, place, item = task
        what = slot(item)
        loader.load(what, batch.row(place, loader, what))
        return batch, place

    with contextlib.ExitStack() as stack:
        load, threads = load_here, num_threads(threads, processes)
        workers = None
        if processes > 1:
            workers = Workers(loader, processes, threads)
            threads = workers.num_threads

            def load(task: tuple[_Batch, int, Any]) -> tuple[_Batch, int]:
                batch, place, item = task
                what = slot(item)
                block = batch.block(loader, what, workers.blocks)
                workers.load(what, block, batch.size, place)
                return batch, place

        loaded = stack.enter_context(
            contextlib.closing(map_ordered(load, tasks(), threads=threads, ahead=ahead))
        )
        if workers is not None:  # ended first: no thread then waits for them any more
            stack.enter_context(contextlib.closing(workers))
        for batch, place in loaded:
            if place == batch.size - 1:
                for array in batch.arrays.values():
                    array.flags.writeable = False
                yield batch.arrays


class Batches(Iterator[Example]):
    """Iterator over the batches of this host; arrays are read-only.

    Attributes:
      num_batches: how many there are in all.
    """

    def __init__(
        self,
        loader: Loader,
        slot: Callable[[int], Any],
        numbers: range,
        batch_size: int,
        *,
        processes: int,
        num_threads: int,
        prefetch: int,
    ):
        """Reads nothing before the first batch is asked for.

        Args:
          loader: makes the examples.
          slot: what the loader is to make of a number.
          numbers: of all slots, batch after batch.
          batch_size: slots of a batch on this host.
          processes: that load examples, 0: automatic (`common.data.workers.pool.worker_count`).
          num_threads: of all of them, 0: automatic.
          prefetch: batches made ahead, which bounds what is held in memory.
        """
        self.num_batches = len(numbers) // batch_size
        self._photo_errors = loader.photo_errors
        self._repeated_before = remote.repeated.count
        starts = range(numbers.start, numbers.start + self.num_batches * batch_size, batch_size)
        self._examples = stack_examples(
            loader,
            (range(start, start + batch_size) for start in starts),
            slot=slot,
            processes=worker_count(processes, self.num_batches * batch_size),
            threads=num_threads,
            ahead=(prefetch + 1) * batch_size,
        )

    @property
    def skipped_images(self) -> int:
        """Photos left out so far because they cannot be read (those loaded ahead too)."""
        return self._photo_errors.skipped

    @property
    def left_out(self) -> str:
        """What was left out or read again so far, in words; '' if nothing was."""
        counts = self.counts().items()
        return ", ".join(f"{count} {what}" for what, count in counts if count)

    def counts(self) -> dict[str, int]:
        """What `left_out` tells."""
        return {
            "reads from remote storage repeated": remote.repeated.count - self._repeated_before,
            "unreadable photos skipped": self.skipped_images,
        }

    def __next__(self) -> Example:
        return next(self._examples)


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
    """Slots of this host in a batch of all hosts.

    Raises:
      UserError: the batch cannot be shared evenly.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: expected a positive multiple of {process_count}, "
            "the number of hosts"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    return batch_size // process_count
