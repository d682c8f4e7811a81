"""The arrays of a batch in memory that several processes map.

A block is an anonymous file in memory (memfd): it has no name that could be left behind, no limit
of /dev/shm, and it is gone with the last process that has it. Blocks are used again, since pages
that are new to a process cost more than the pixels that are put there; but only when nobody holds
an array of theirs any more, be it a device that aliases it: so no batch is copied, or overwritten.
"""

import collections
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

Fields = Mapping[str, tuple[tuple[int, ...], DTypeLike]]  # shape and type of each

ALIGNMENT = 64  # bytes: what XLA asks of arrays that it takes as they lie


class Block:
    """Memory that other processes can map.

    Attributes:
      number: of this block among all that the process ever made.
      fd: descriptor of the file; closed with this object.
      nbytes: of it, at least those asked for.
      memory: the bytes, which stay as long as something uses them, also without this object.
    """

    _numbers = itertools.count()

    def __init__(self, nbytes: int):
        self.number = next(self._numbers)
        self.nbytes = max(nbytes, 1)  # no empty file can be mapped
        self.fd = os.memfd_create("examples", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, self.nbytes)
        self.memory = mmap.mmap(self.fd, self.nbytes)


class Blocks:
    """Blocks of the batches of a run, of which some are free; threads share them.

    Attributes:
      alive: numbers of those that there are.
    """

    def __init__(self):
        self.alive: frozenset[int] = frozenset()
        self._free: list[Block] = []
        self._returned: collections.deque[Block] = collections.deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> tuple[Block, np.ndarray]:
        """A block that nobody uses, and its bytes; it is free again when all views of these are
        gone. A free one that is too small makes room for it."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            places = [i for i, block in enumerate(self._free) if block.nbytes >= nbytes]
            if places:
                block = self._free.pop(places[0])
            else:
                dropped = {self._free.pop(0).number} if self._free else set()
                block = Block(nbytes)
                self.alive = self.alive - dropped | {block.number}
        # Views of an array that does not own its memory have this array as their base.
        content = np.frombuffer(block.memory, np.uint8)
        # Not a method: that would take the lock, which the thread that it comes upon may hold.
        weakref.finalize(content, self._returned.append, block).atexit = False
        return block, content


class Layout(NamedTuple):
    """Where the arrays of a batch lie in its block.

    Attributes:
      fields: name, shape, type and first byte of each array.
      nbytes: of all.
    """

    fields: tuple[tuple[str, tuple[int, ...], np.dtype, int], ...]
    nbytes: int

    @classmethod
    def of(cls, fields: Fields, size: int) -> "Layout":
        """`fields`: of an example; `size`: examples of the batch."""
        placed, end = [], 0
        for name, (shape, dtype) in fields.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            kind = np.dtype(dtype)
            placed.append((name, (size, *shape), kind, start))
            end = start + size * int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return cls(tuple(placed), end)

    def arrays(self, memory: mmap.mmap | np.ndarray) -> dict[str, np.ndarray]:
        """The arrays in the memory of a block."""
        return {
            name: np.ndarray(shape, dtype, memory, start)
            for name, shape, dtype, start in self.fields
        }
