"""NumPy's .npz files, of which nothing is allocated that the file does not hold."""

import io
import math
import tokenize
from pathlib import Path

import numpy as np

from common.io.archive import Archive
from common.io.errors import UserError

_BROKEN = (
    *(ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError),
    *(OverflowError, tokenize.TokenError),
)
_UNFOLDED = 1 << 30  # bytes of all arrays: counts of rare pairs are mostly zeros


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file by name.

    Raises:
      OSError: it cannot be read.
      UserError: no zip file, or an array that is damaged, of objects, or of another size than its
        header says.
    """
    with open(path, "rb") as file:
        archive = Archive(file, always=_UNFOLDED)
        return {
            name.removesuffix(".npy"): _array(name, archive.read(name)) for name in archive.names
        }


def _array(name: str, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(stream)
    # The header is a Python literal.
    except _BROKEN as error:
        text = " ".join(str(error).split())[:100]
        raise UserError(f"{name}: found no header of an array ({text})") from error
    size = len(data) - stream.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise UserError(f"{name}: found {size} bytes, expected {dtype} of shape {shape}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if is_fortran else "C")
