"""A loader as bytes for other processes on this machine, which share its large arrays.

Memory-mapped files are mapped again by the processes that get them; other large arrays lie in a
block of shared memory once for all; locks are made anew; sinks (`sinks.Sink`) stay where they
are.
"""

import io
import mmap
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.workers.blocks import ALIGNMENT, Block
from common.data.workers.sinks import Recorder, Sink

_LARGE = 4096  # bytes of an array that is shared; smaller ones are part of the pickle
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


def pack(thing: Any, known: Sequence[Sink] = ()) -> tuple[Block, list[int], list[Sink]]:
    """Puts an object into a block.

    Args:
      thing: to be handed over.
      known: the first of the sinks, by number.

    Returns:
      The block, the lengths of the pickle and of each large array in it, and all sinks met.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, list(known))
    pickler.dump(thing)
    parts = [memoryview(file.getbuffer()), *(large.raw() for large in pickler.large)]
    lengths = [part.nbytes for part in parts]
    block = Block(sum(map(_aligned, lengths)))
    memory, start = memoryview(block.memory), 0
    for part in parts:
        memory[start : start + part.nbytes] = part
        start += _aligned(part.nbytes)
    return block, lengths, pickler.sinks


def unpack(memory: mmap.mmap, lengths: Sequence[int]) -> Any:
    """The object in a block that was mapped read-only; its large arrays lie there."""
    parts, start = [], 0
    for length in lengths:
        parts.append(memoryview(memory)[start : start + length])
        start += _aligned(length)
    return _Unpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


class _Pickler(pickle.Pickler):
    """Attributes: `large`: arrays beside the pickle; `sinks`: met so far."""

    def __init__(self, file: io.BytesIO, sinks: list[Sink]):
        super().__init__(file, protocol=5, buffer_callback=self._beside)
        self.large: list[pickle.PickleBuffer] = []
        self.sinks = sinks

    def _beside(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the array is part of the pickle; notes it if not."""
        if buffer.raw().nbytes < _LARGE:
            return True
        self.large.append(buffer)
        return False

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Sink):
            return None
        for number, sink in enumerate(self.sinks):
            if sink is obj:
                return number
        self.sinks.append(obj)
        return len(self.sinks) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray) and (mapped := _mapped(obj)) is not None:
            return _reduce_map(obj, mapped)
        if isinstance(obj, _LOCKS):
            return threading.RLock if isinstance(obj, _LOCKS[1]) else threading.Lock, ()
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Recorder:
        return Recorder(pid)


def _mapped(array: Any) -> Any:
    """The `np.memmap` that an array is, or is a view of; None: it lies elsewhere."""
    while isinstance(array, np.ndarray):
        if getattr(array, "_mmap", None) is not None:
            return array
        array = array.base
    return None


def _reduce_map(array: np.ndarray, mapped: Any) -> Any:
    """How a mapped array is made again: from its file, if it has a name, at its true place."""
    if mapped.filename is None or not array.flags.c_contiguous:
        return np.asarray, (np.array(array),)
    # `offset` is that of the whole map, also of an array that is a part of it.
    first = np.frombuffer(mapped._mmap, np.uint8, 1).ctypes.data
    within = array.ctypes.data - first
    start = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY + within
    return _map, (str(mapped.filename), array.dtype, array.shape, start)


def _map(path: str, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)
