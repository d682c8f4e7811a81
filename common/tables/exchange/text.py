"""Text files of many numbers: columns to lines without a Python loop over rows, written atomically.

Shape legend: n rows.
"""

import contextlib
import gzip
import os
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.io.atomic import open_atomic
from common.io.paths import PathLike


@contextlib.contextmanager
def open_lines(path: PathLike) -> Iterator[IO[bytes]]:
    """Opens a binary file that appears under its name at the end; `.gz` is compressed.

    Raises:
      UserError: it cannot be written.
    """
    with open_atomic(path, "wb") as raw:
        if os.fspath(path).endswith(".gz"):
            # No name and no time inside: the same detections give the same bytes.
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw


def numbers(values: np.ndarray, digits: int | None = None) -> pa.Array:
    """Shortest texts that read back as the same number of the same width, after rounding."""
    values = np.ascontiguousarray(values)
    if digits is not None and values.dtype.kind == "f":
        values = np.round(values, digits)
    if values.dtype.kind == "f":
        values = values + values.dtype.type(0)  # -0 is written 0
    return pa.array(values).cast(pa.string())


def pick(texts: list[str], codes: np.ndarray) -> pa.Array:
    """The text of each code."""
    codes = pa.array(np.asarray(codes, np.int32))
    return pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string())).cast(pa.string())


def join(*pieces: pa.Array | str) -> pa.Array:
    """Concatenates columns and fixed texts row by row."""
    return pc.binary_join_element_wise(*pieces, "")


def join_groups(texts: pa.Array, offsets: np.ndarray, separator: str) -> pa.Array:
    """Joins rows offsets[i]:offsets[i + 1] to one text each."""
    lists = pa.ListArray.from_arrays(pa.array(np.asarray(offsets, np.int32)), texts)
    return pc.binary_join(lists, separator)


def write_texts(file: IO[bytes], texts: pa.Array, separator: str = "") -> None:
    """Writes all rows, `separator` between them."""
    whole: Any = join_groups(texts, np.array([0, len(texts)]), separator)
    file.write(whole[0].as_buffer())
