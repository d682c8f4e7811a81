"""Text files of many numbers: columns to lines without a Python loop over rows, written atomically.

Shape legend: n rows.
"""

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.io.errors import UserError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name when the block ends well; `.gz` is compressed.

    Raises:
      UserError: no place to write to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as raw:
            if path.suffix == ".gz":
                # No name and no time inside: the same detections give the same bytes.
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                    yield file
            else:
                yield raw
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


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
