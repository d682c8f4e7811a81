"""Reading JSON files of any size element by element, with the standard library only.

Objects365 has a training file of more than 5 GB, which `json.load` would turn into some 40 GB of
Python objects. One element at a time costs a few megabytes and about 3 microseconds an element.
"""

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.convert.report import Ticker
from common.io.errors import UserError

_CHUNK = 4 << 20  # characters read at once
_LARGEST = 256 << 20  # characters of the largest value
_SPACE = re.compile(r"[ \t\r\n]*")


def stream_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Walks through the object at the top of a JSON file.

    Args:
      path: of the file.

    Yields:
      (key, element) for each element of each list, and (key, value) for other values. An empty
      list yields (key, None), so that every key is seen.

    Raises:
      UserError: no such file, not UTF-8, cut off or no JSON object; names the place.
    """
    with _opened(path) as walker:
        yield from walker.walk()


def stream_json_list(path: Path) -> Iterator[Any]:
    """Walks through the list at the top of a JSON file, such as COCO results.

    Args:
      path: of the file, possibly .gz.

    Yields:
      The elements.

    Raises:
      UserError: no such file, not UTF-8, cut off or no JSON list; names the place.
    """
    with _opened(path) as walker:
        yield from walker.walk_list()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["_Walker"]:
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield _Walker(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is cut off or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror or error})") from error


class _Walker:
    def __init__(self, path: Path, file):
        self._path, self._file = path, file
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._passed = 0  # characters before the buffer, for messages
        self._done = 0  # elements of lists
        self._ended = False
        self._ticker = Ticker(path.name, unit="values")
        self._size = os.path.getsize(path)

    def walk(self) -> Iterator[tuple[str, Any]]:
        self._expect("{", "an object {...} at the top")
        if self._next() == "}":
            return
        while True:
            key = self._value()
            self._expect(":", "':' after a key")
            if self._next() != "[":
                yield key, self._value()
            else:
                empty = True
                for element in self._elements():
                    empty = False
                    yield key, element
                if empty:
                    yield key, None
            if self._take(",}", "',' or '}' after a value") == "}":
                return

    def walk_list(self) -> Iterator[Any]:
        if self._next() != "[":
            self._fail("expected a list [...] at the top")
        yield from self._elements()

    def _elements(self) -> Iterator[Any]:
        """Elements of the list that begins here."""
        self._expect("[", "'[' of a list")
        if self._next() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            self._done += 1
            if self._done % 10_000 == 0:
                self._ticker.tick(self._done, self._fraction())
            if self._take(",]", "',' or ']' in a list") == "]":
                return

    def _fraction(self) -> float | None:
        return None if self._path.suffix == ".gz" else self._passed / self._size

    def _read(self) -> None:
        """Adds a chunk to the buffer and forgets what was used."""
        chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not chunk
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0

    def _next(self) -> str:
        """The next character that is no space, '' at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def _take(self, characters: str, expected: str) -> str:
        found = self._next()
        if not found or found not in characters:
            self._fail(expected)
        self._at += 1
        return found

    def _expect(self, character: str, expected: str) -> None:
        self._take(character, expected)

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                # A number may go on in the next chunk: '1' of '1e+5' leaves 'e+' undecoded.
                if end + 2 < len(self._text) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or len(self._text) - self._at > _LARGEST:
                    self._at = min(error.pos, len(self._text))
                    self._fail(error.msg)
            self._read()

    def _fail(self, expected: str) -> None:
        where = self._passed + self._at
        if self._ended and self._at >= len(self._text.rstrip()):
            raise UserError(f"{self._path}: the file ends at character {where:,}, it is cut off")
        near = self._text[self._at : self._at + 30]
        raise UserError(
            f"{self._path}: no valid JSON at character {where:,} (near {near!r}): {expected}"
        )
