"""Outputs that appear under their name whole or not at all, local or at a gs:// address."""

import contextlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from common.io.errors import UserError
from common.io.paths import PathLike, is_remote, to_epath
from common.io.storage_errors import is_store_error


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Gives a local path to write a file to, which becomes `path` when the block ends well.

    The temporary file lies beside a local output, so that the last step is a rename. For a remote
    output it lies on the local disk and is copied beside the output before the rename. An error in
    the block removes it, and a file that was there before stays. Missing folders are made.

    Raises:
      UserError: `path` is a folder, or it cannot be written (an OSError in the block included).
    """
    output = to_epath(path)
    remove_leftovers(path)
    beside = output.with_name(_temporary_name(output))
    with contextlib.ExitStack() as stack:
        try:
            if output.is_dir():
                raise UserError(f"{output}: is a folder, expected the name of a file")
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(beside)
            if is_remote(path):
                temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()), output.name)
            yield temporary
            if is_remote(path):
                epath.Path(temporary).copy(beside)
            beside.replace(output)
        except BaseException as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            if isinstance(error, OSError) or is_store_error(error):
                raise UserError(f"{output}: cannot write ({error})") from error
            raise


@contextlib.contextmanager
def open_atomic(path: PathLike, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a file that appears under its name when the block ends well (see `atomic_file`).

    Args:
      path: local or gs://.
      mode: "w" (UTF-8 unless the options say otherwise) or "wb".
      **options: of the builtin `open`, such as newline="".

    Raises:
      UserError: as `atomic_file`.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_file(path) as temporary, open(temporary, mode, **options) as file:
        yield file


def write_text(path: PathLike, text: str) -> None:
    """Writes a whole UTF-8 text file, as `atomic_file` does."""
    with open_atomic(path) as file:
        file.write(text)


def write_json(path: PathLike, value: Any) -> None:
    """Writes indented JSON, as `atomic_file` does; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[epath.Path]:
    """Gives an empty folder beside `path`, which takes its place when the block ends well.

    A folder that was there before is replaced; an error in the block leaves it as it was. On
    object stores such as gs:// the last step moves object by object and is not atomic.

    Raises:
      UserError: it cannot be written (an OSError in the block included).
    """
    output = to_epath(path)
    remove_leftovers(path)
    temporary, old = output.with_name(_temporary_name(output)), None
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            old = output.rename(output.with_name(_temporary_name(output, "old")))
        temporary.rename(output)
        if old is not None:
            old.rmtree()
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.rmtree(missing_ok=True)
        if isinstance(error, OSError) or is_store_error(error):
            raise UserError(f"{output}: cannot write ({error})") from error
        raise


def _temporary_name(path: epath.Path, kind: str = "tmp") -> str:
    """A name of no other process, and of no other thread that writes the same output."""
    return f"{path.name}.{kind}-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def remove_leftovers(path: PathLike) -> None:
    """Removes what killed runs on this machine left beside an output of theirs; local only.

    A folder that was moved aside for a new one which never came goes back to its place.
    """
    output = Path(path)
    if is_remote(path) or not output.parent.is_dir():
        return
    name = re.escape(output.name)
    kind_and_process = rf"(tmp|old)-{re.escape(platform.node())}-(\d+)"
    pattern = re.compile(rf"{name}\.{kind_and_process}-[0-9a-f]{{8}}(-.*)?")
    for entry in list(os.scandir(output.parent)):
        match = pattern.fullmatch(entry.name)
        if match is None or _is_running(int(match[2])):
            continue
        with contextlib.suppress(OSError):  # of somebody else, or gone by now
            if match[1] == "old" and not output.exists():
                os.rename(entry.path, output)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def temporary_beside(path: PathLike) -> Path:
    """A name for a folder of scratch files beside an output, which `remove_leftovers` knows."""
    output = to_epath(path)
    return Path(output.with_name(f"{_temporary_name(output)}-scratch"))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
