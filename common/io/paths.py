"""Paths that a user gives: local, or an address such as gs://bucket/name (through etils.epath)."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from common.io.errors import UserError
from common.io.storage_errors import is_store_error

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether the path is an address such as gs://bucket/name instead of a local file."""
    return "://" in os.fspath(path)


def resolved(path: PathLike) -> str:
    """The same text for the same file: absolute and without links, where the path is local."""
    return os.fspath(path) if is_remote(path) else os.path.realpath(path)


def to_epath(path: PathLike) -> epath.Path:
    """The path, on whichever storage it lies.

    Raises:
      UserError: an address that no storage here serves, such as https://.
    """
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(
            f"{path}: found an address of an unknown kind, expected a local path or gs://"
        ) from error


@contextlib.contextmanager
def local_copy(path: PathLike) -> Iterator[Path]:
    """Gives a local file with the content of `path`, for libraries that map or seek in files.

    A local path is given as it is. A remote file is copied to a temporary one, which is removed
    when the block ends.

    Raises:
      OSError: no such file, or it cannot be copied.
      UserError: as `to_epath`.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = to_epath(path)
        target = Path(folder, source.name)
        try:
            source.copy(target)
        except Exception as error:
            if is_store_error(error):
                raise OSError(str(error)) from error
            raise
        yield target


def check_regular(path: PathLike) -> None:
    """Refuses a pipe or a device in the place of a file, which might never end.

    Raises:
      UserError: it is one.
    """
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: found no regular file, expected one")


def read_text(path: PathLike) -> str:
    """The content of a UTF-8 file.

    Raises:
      OSError: no such file, or it cannot be read.
      UserError: as `to_epath`.
    """
    with local_copy(path) as local:
        return local.read_text(encoding="utf-8")
