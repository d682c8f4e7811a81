"""Mutated inputs for readers, in a process of their own.

    python -m tests.fuzzing READER,READER SECONDS [SEED]

Every input either is read or gives a `UserError` of one line, within seconds and 1 GiB. Anything
else (another exception, a crash, a hang) ends the process with the input's name; the inputs are a
function of the seed. `FUZZ_SECONDS=60 pytest tests/test_fuzz.py` looks longer.
"""

import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.io.errors import UserError
from tests.fuzz_readers import READERS

# Bytes for one input; threads that it starts reserve addresses of their own.
SPARE = (1 << 30) + (os.cpu_count() or 1) * (80 << 20)
LONGEST = 20  # seconds for one input
_NASTY_NUMBERS = (
    *(b"0", b"-1", b"1", b"1e400", b"-1e400", b"NaN", b"1.5", b"2147483648", b"4294967296"),
    *(b"9223372036854775808", b"1e30", b"9" * 5000, b"null", b"true", b'"7"', b"[]", b"{}"),
)
_NASTY_TEXTS = (
    *(b"\x00", b"\xff\xfe", b"\xc3", b"\r", b"\n", b'"', b"\\ud800", b"[" * 5000, b"{" * 3000),
    *(b'{"a":' * 3000, b"<a>" * 3000, b"../../etc", b"%00", b"%", b",", b" ", b"-", b"\\"),
    *("é".encode(), "e\u0301".encode(), b"x" * 70_000, b"&amp;", b"null", b"[]", b"{}", b"()"),
)
_WORDS = b"0123456789.-+eE"


def mutate(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four changes: of bits, bytes, numbers, texts, parts, or the end."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(10)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + draw.randrange(1, 40)]
        elif kind == 4:
            data[place:place] = draw.choice(_NASTY_TEXTS)
        elif kind in (5, 6):
            start, stop = _number_at(data, place)
            data[start:stop] = draw.choice(_NASTY_NUMBERS)
        elif kind == 7:
            part = data[place : place + draw.randrange(1, 200)]
            data[place:place] = part * draw.choice((1, 3, 1000))
        elif kind == 8:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            data[place : place + draw.randrange(60)] = other[start : start + draw.randrange(60)]
        else:
            size = draw.choice((1, 2, 4, 8))
            value = draw.choice((0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1)))
            data[place : place + size] = value.to_bytes(size, draw.choice(("little", "big")))
    return bytes(data)


def _number_at(data: bytearray, place: int) -> tuple[int, int]:
    """Ends of the next number at or after a place."""
    start = place
    while start < len(data) and data[start] not in _WORDS:
        start += 1
    stop = start
    while stop < len(data) and data[stop] in _WORDS:
        stop += 1
    return start, stop


def fuzz(
    read: Callable[[Path], object], folder: Path, seeds: list[Path], seconds: float, seed: int
) -> int:
    """Reads a folder over and over, each time with one file of it changed.

    Args:
      read: reads the folder.
      folder: whole and readable.
      seeds: files in it to change.
      seconds: to go on.
      seed: of the changes.

    Returns:
      The number of inputs.
    """
    read(folder)
    contents = {path: path.read_bytes() for path in seeds}
    signal.signal(signal.SIGALRM, _too_long)
    deadline, number = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        draw = random.Random(f"{seed} {number}")
        path = draw.choice(seeds)
        path.write_bytes(mutate(contents[path], list(contents.values()), draw))
        signal.alarm(LONGEST)
        try:
            with _little_memory():
                read(folder)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"an error of several lines: {error}") from error
        except BaseException:
            signal.alarm(0)
            kept = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}-{path.name}")
            shutil.copy(path, kept)
            print(f"seed {seed}, input {number}, {path.name} kept as {kept}", file=sys.stderr)
            raise
        signal.alarm(0)
        path.write_bytes(contents[path])
        number += 1
    return number


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """`SPARE` beside what the process has by now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"an input took more than {LONGEST} s")


def main(names: str, seconds: float, seed: int = 0) -> None:
    """Looks at readers of `tests.fuzz_readers`, one after the other."""
    faulthandler.enable()
    for name in names.split(","):
        print(f"{name}, seed {seed} ...", flush=True)  # the last words of a process that is killed
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "in")
            folder.mkdir()
            read, seeds = READERS[name](folder)
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                number = fuzz(read, folder, seeds, seconds, seed)
        print(f"{name}: {number} inputs in {seconds:g} s, seed {seed}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:4]))
