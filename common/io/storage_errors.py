"""Telling failures of the file system, a full disk above all, from failures of the program."""

import errno
import os
import shutil
from collections.abc import Iterator

from etils import epath


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_disk_full(error: Exception) -> bool:
    """Whether a full disk or an exhausted quota is behind the error."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or os.strerror(errno.ENOSPC) in str(cause)
        or os.strerror(errno.EDQUOT) in str(cause)
        for cause in _causes(error)
    )


def is_file_error(error: Exception) -> bool:
    """tensorstore reports failures of the file system as ValueError with the number in the text."""
    return is_disk_full(error) or any(
        isinstance(cause, OSError) or "os_error_code" in str(cause) for cause in _causes(error)
    )


def free_space(directory: epath.Path) -> str:
    """The free space of a local disk for an error message, or nothing."""
    try:
        return f" ({shutil.disk_usage(directory).free / 1e9:.2f} GB free)"
    except OSError:  # not a local directory
        return ""


def is_store_error(error: BaseException) -> bool:
    """Whether the client of gs:// raised the error: TensorFlow's own are no OSError."""
    return type(error).__module__.startswith("tensorflow.")
