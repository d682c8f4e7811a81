"""Members of zip files, read within bounds and with one line for every way to be broken."""

import zipfile
import zlib
from typing import BinaryIO

from common.io.errors import UserError

# What a file may unfold to: weights do not shrink by more, and small files are small.
_MAX_RATIO = 16
_ALWAYS = 64 << 20  # bytes


class Archive:
    """An opened zip file.

    Attributes:
      names: of its members.
    """

    def __init__(self, stream: BinaryIO, always: int = _ALWAYS):
        """Reads the list of members.

        Args:
          stream: the file.
          always: bytes to which it may unfold however small it is.

        Raises:
          UserError: no zip file.
        """
        self._size = stream.seek(0, 2)
        stream.seek(0)
        self._unfolded, self._always = 0, always
        try:
            self._zip = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise UserError(f"found no readable zip file ({error})") from error
        self.names = self._zip.namelist()

    def size(self, name: str) -> int:
        """Bytes of a member, as the list of members states it.

        Raises:
          UserError: there is no such member.
        """
        return self._member(name).file_size

    def read(self, name: str) -> bytes:
        """Content of a member.

        Raises:
          UserError: there is no such member, it is encrypted, damaged or of an unknown kind, or
            all that was read is much more than the file.
        """
        member = self._member(name)
        self._unfolded += member.file_size
        limit = max(self._always, _MAX_RATIO * self._size)
        if self._unfolded > limit:
            raise UserError(
                f"{name}: found {self._unfolded:,} bytes in a zip file of {self._size:,}, expected "
                f"at most {limit:,}"
            )
        try:
            data = self._zip.read(member)
        # zipfile: RuntimeError for encrypted members, NotImplementedError for unknown methods.
        except (RuntimeError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise UserError(f"{name}: found an unreadable member ({error})") from error
        except zlib.error as error:
            raise UserError(f"{name}: found a damaged member ({error})") from error
        if len(data) != member.file_size:
            raise UserError(f"{name}: found {len(data):,} bytes, expected {member.file_size:,}")
        return data

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(name)
        except KeyError as error:
            raise UserError(f"found no {name} in the zip file") from error
