"""Elements of long JSON lists one after the other, so that memory does not grow with the file.

Objects365 has a training file of more than 5 GB, which `json.load` would turn into some 40 GB of
Python objects. ijson parses it with the C library yajl, which holds one element at a time.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np

from common.io.errors import UserError
from common.io.paths import check_regular
from common.io.progress import Progress

_CHUNK = 1 << 18  # bytes
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DEEPEST = 200  # of lists in lists: ijson keeps the path to each, of a length that grows with it
_OPEN_OR_CLOSE = np.zeros(256, np.int8)
_OPEN_OR_CLOSE[[*b"[{"]], _OPEN_OR_CLOSE[[*b"]}"]] = 1, -1
_NO_MARKS = bytes(set(range(256)) - {*b'"[]{}'})


def stream_list(path: Path) -> Iterator[Any]:
    """Walks through the list at the top of a JSON file, such as COCO results.

    Numbers are int where they are written without point and exponent, else float.

    Args:
      path: of the file, possibly .gz.

    Raises:
      UserError: no such file, cut off, no JSON (NaN is none), nested without end, or no list; names
        the place.
    """
    return _elements(path, None, required=True, first=True)


def stream_lists(
    path: Path, keys: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Walks through lists of the object at the top of a JSON file, one list after the other.

    Args:
      path: of the file, possibly .gz; it is read once for each key.
      keys: of the lists, in the order of the walk.
      optional: those of the keys that may be missing.

    Yields:
      (key, element).

    Raises:
      UserError: like `stream_list`, or a key is missing.
    """
    for number, key in enumerate(keys):
        for element in _elements(path, key, key not in optional, first=not number):
            yield key, element


def _elements(path: Path, key: str | None, required: bool, *, first: bool) -> Iterator[Any]:
    """The elements of a list; `first`: the file was not looked through before."""
    empty = True
    prefix = "item" if key is None else f"{key}.item"
    for element in _parse(path, "items", prefix, check_depth=first):
        empty = False
        yield element
    if empty:
        _check_empty(path, key, required)


def _check_empty(path: Path, key: str | None, required: bool) -> None:
    """Tells an empty list from something else in its place."""
    events = _parse(path, "parse")
    _, top, _ = next(events)
    if top != ("start_array" if key is None else "start_map"):
        expected = "a list [...]" if key is None else "an object {...}"
        raise UserError(f"{path}: expected {expected} at the top")
    kinds: dict[str, str] = {}  # key at the top -> the event with which its value begins
    for prefix, event, _ in events:
        if prefix and "." not in prefix:
            kinds.setdefault(prefix, event)
    if key in kinds and kinds[key] not in ("start_array", "null"):
        raise UserError(f"{path}: expected a list under {key!r}")
    if key is not None and key not in kinds and required:
        raise UserError(f"{path}: no {key!r}; found {', '.join(list(kinds)[:8]) or 'nothing'}")


def _parse(path: Path, parser: str, *arguments: str, check_depth: bool = False) -> Iterator[Any]:
    """Runs a parser of ijson over a file, with errors of one line."""
    check_regular(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            source = _Source(path, file, check_depth)
            try:
                yield from getattr(ijson, parser)(
                    source, *arguments, use_float=True, buf_size=_CHUNK
                )
            except ijson.JSONError as error:
                raise UserError(f"{path}: {source.describe(error)}") from error
            except UnicodeDecodeError as error:  # half of a pair of surrogates
                raise UserError(
                    f"{path}: found an escape that is no character ({error})"
                ) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is cut off or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror or error})") from error


class _Nesting:
    """Depth of the lists and objects of a JSON text that goes by in pieces."""

    def __init__(self):
        self._depth, self._in_string, self._pending = 0, 0, b""

    def deepest(self, piece: bytes) -> int:
        """The greatest depth in the next piece, which brackets in strings do not count to."""
        text = self._pending + piece
        whole = text.rstrip(b"\\")  # of these the first byte of the next piece decides
        self._pending = text[len(whole) :]
        if b"\\" in whole:
            whole = whole.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = np.frombuffer(whole.translate(None, _NO_MARKS), np.uint8)
        if not len(marks):
            return self._depth
        inside = (np.cumsum(marks == ord('"'), dtype=np.int32) + self._in_string) & 1
        steps = _OPEN_OR_CLOSE[marks]
        steps[inside == 1] = 0
        depths = self._depth + np.cumsum(steps, dtype=np.int64)
        self._depth, self._in_string = int(depths[-1]), int(inside[-1])
        return int(depths.max())


class _Source:
    """A file that knows how far it has been read."""

    def __init__(self, path: Path, file: BinaryIO | gzip.GzipFile, check_depth: bool):
        self._path, self._file = path, file
        self._nesting = _Nesting() if check_depth else None
        self._chunk, self._start, self._end = b"", 0, 0
        size = 0 if path.suffix == ".gz" else os.path.getsize(path)
        self._progress = Progress(size >> 20, what=path.name, unit="MiB")

    def read(self, size: int) -> bytes:
        self._chunk, self._start = self._file.read(size), self._end
        self._end += len(self._chunk)
        self._progress.report(self._end >> 20)
        if self._nesting is not None and self._nesting.deepest(self._chunk) > _DEEPEST:
            raise UserError(
                f"{self._path}: nested more than {_DEEPEST} deep between the bytes "
                f"{self._start:,} and {self._end:,}"
            )
        return self._chunk.removeprefix(_BYTE_ORDER_MARK) if self._start == 0 else self._chunk

    def describe(self, error: ijson.JSONError) -> str:
        """What is wrong and where: yajl tells the reason, the text around the place, an arrow."""
        text = error.args[0]
        text = text if isinstance(text, bytes) else str(text).encode()
        if b"premature EOF" in text or not self._end:
            return f"the file ends at byte {self._end:,}, it is cut off"
        reason, near, arrow = [*text.split(b"\n"), b"", b""][:3]
        column = arrow.find(b"^") - (len(near) - len(near.lstrip()))
        near = near.strip()
        begin = self._chunk.replace(b"\n", b" ").find(near)
        place = self._start + max(begin, 0) + max(column, 0)
        return (
            f"no valid JSON near byte {place:,} ({near.decode('utf-8', 'replace')!r}): "
            f"{reason.decode().rstrip('.')}"
        )
