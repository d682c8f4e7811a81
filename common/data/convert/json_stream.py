"""Reading JSON files of any size element by element, with the standard library only.

Objects365 has a training file of more than 5 GB, which `json.load` would turn into some 40 GB of
Python objects. One element at a time costs a few megabytes and about 3 microseconds an element.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.convert.report import Ticker
from common.errors import UserError

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
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Walker(path, file).walk()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error


class _Walker:
    def __init__(self, path: Path, file):
        self._path, self._file = path, file
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._passed = 0  # characters before the buffer, for messages
        self._ended = False
        self._ticker = Ticker(path.name, unit="values")
        self._size = os.path.getsize(path)

    def walk(self) -> Iterator[tuple[str, Any]]:
        self._expect("{", "an object {...} at the top")
        done = 0
        if self._next() == "}":
            return
        while True:
            key = self._value()
            self._expect(":", "':' after a key")
            if self._next() != "[":
                yield key, self._value()
            else:
                self._at += 1
                if self._next() == "]":
                    self._at += 1
                    yield key, None
                else:
                    while True:
                        yield key, self._value()
                        done += 1
                        if done % 10_000 == 0:
                            self._ticker.tick(done, self._passed / self._size)
                        if self._take(",]", "',' or ']' in a list") == "]":
                            break
            if self._take(",}", "',' or '}' after a value") == "}":
                return

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
