"""Streaming of large CSV files by column name, with one clear line for every way to be broken."""

import csv
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from common.io.errors import UserError
from common.io.paths import check_regular
from common.io.progress import Progress

_BLOCK_BYTES = 8 << 20


def read_header(path: Path) -> list[str]:
    """Column names of a CSV file.

    Raises:
      UserError: no such file, empty, or not UTF-8.
    """
    check_regular(path)
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            line = re.split(rb"[\r\n]", stream.read(1 << 16), maxsplit=1)[0]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot read it ({error})") from error
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: row 1 is not UTF-8 ({error}); save the file as UTF-8") from error
    if not text:
        raise UserError(f"{path}: empty, expected a CSV file with a header")
    try:
        names = [name.strip() for name in next(csv.reader([text]))]
    except csv.Error as error:
        raise UserError(f"{path}: row 1 is no header of a CSV file ({error})") from error
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise UserError(f"{path}: column {repeated!r:.40} is there twice")
    return names


def stream_csv(
    path: Path,
    columns: Mapping[str, pa.DataType],
    optional: Mapping[str, pa.DataType] | None = None,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Reads a CSV file in blocks.

    Args:
      path: the file, possibly compressed (.gz, .bz2).
      columns: name -> type of the columns that must be there; others are skipped.
      optional: further columns, read if they are there.

    Yields:
      The line number of the first row (the header is line 1), and the rows.

    Raises:
      UserError: names the missing columns and those found, or the row that cannot be read.
    """
    header = read_header(path)
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; found {', '.join(header[:20])}; expected "
            f"{', '.join(columns)}"
        )
    types = {**columns, **{k: v for k, v in (optional or {}).items() if k in header}}
    size = os.path.getsize(path)
    progress = Progress(size >> 20, what=path.name, unit="MiB")
    line = 2
    try:
        with open(path, "rb") as raw:
            stream = pa.input_stream(pa.PythonFile(raw, "r"), compression=_compression(path))
            reader = pyarrow.csv.open_csv(
                stream,
                # Messages tell the row only with one thread; parsing is not what takes the time.
                read_options=pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=header, skip_rows=1
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(types), column_types=types
                ),
            )
            for batch in reader:
                yield line, batch
                line += batch.num_rows
                progress.report(raw.tell() >> 20, {"rows": line - 2})
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        if "Empty CSV file" in text:  # a header and nothing below it
            return
        for i, name in enumerate(header):
            text = text.replace(f"CSV column #{i}:", f"column {name},")
        if "invalid UTF8" in text:
            text += "; save the file as UTF-8"
        raise UserError(f"{path}: {text[:300]}") from error


def _compression(path: Path) -> str | None:
    return {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix)
