"""The arrays of a batch in memory that several processes map.

A block is an anonymous file in memory (memfd): it has no name that could be left behind, no limit
of /dev/shm, and it is gone with the last process that has it. Each batch gets a block of its own,
which lives as long as anybody holds one of its arrays, such as the device that aliases it: so
nothing is copied, and nothing is ever overwritten.
"""

import mmap
import os
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

Fields = Mapping[str, tuple[tuple[int, ...], DTypeLike]]  # shape and type of each

_ALIGNMENT = 64  # bytes: what XLA asks of arrays that it takes as they lie


class Block:
    """Memory of zeros that other processes can map.

    Attributes:
      fd: descriptor of the file; closed with this object.
      nbytes: of it.
    """

    def __init__(self, nbytes: int):
        """`nbytes`: at least 1 is taken, since no empty file can be mapped."""
        self.nbytes = max(nbytes, 1)
        self.fd = os.memfd_create("examples", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, self.nbytes)

    def map(self) -> mmap.mmap:
        """The memory; it stays as long as something uses it, also without this object."""
        return mmap.mmap(self.fd, self.nbytes)


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
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            kind = np.dtype(dtype)
            placed.append((name, (size, *shape), kind, start))
            end = start + size * int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return cls(tuple(placed), end)

    def arrays(self, memory: mmap.mmap) -> dict[str, np.ndarray]:
        """The arrays in the memory of a block."""
        return {
            name: np.ndarray(shape, dtype, memory, start)
            for name, shape, dtype, start in self.fields
        }
