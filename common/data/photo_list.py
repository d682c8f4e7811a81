"""Photos named by a user: files, folders, patterns, lists, local or behind addresses such as gs://."""

import dataclasses
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence

from common.data.photo_names import EXTENSIONS, split_extension
from common.io.errors import UserError
from common.io.paths import is_remote, read_text, to_epath

_WILD = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class PhotoList:
    """Some photos below one folder.

    Attributes:
      root: folder of them all, with a slash at its end; an address such as gs://bucket/ as it is.
      names: paths below `root`, with slashes, sorted, none twice.
      left_out: files found in folders and by patterns that are no photos by their names.
    """

    root: str
    names: list[str]
    left_out: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> list[str]:
        """Full path, or address, of each."""
        return [self.root + name for name in self.names]


def find_photos(values: Sequence[str]) -> PhotoList:
    """The photos that some texts name.

    Args:
      values: each a file, a folder (all photos in it and below), a pattern such as
        photos/**/*.jpg, a text file (.txt) of such lines, or several with commas between them.
        Names with a dot in front are no photos of folders and patterns.

    Raises:
      UserError: one names nothing, none of what it names is a photo by its name, or some are
        local and others behind addresses.
    """
    roots, files, left_out = [], [], 0
    for value in _each(values):
        root, found, named = _find(value)
        photos = found if named else [file for file in found if split_extension(file)[1]]
        if not photos:
            seen = f"{len(found)} files" if found else "nothing"
            raise UserError(
                f"--images={value}: found {seen}, expected photos ({', '.join(EXTENSIONS)})"
            )
        left_out += len(found) - len(photos)
        roots.append(root)
        files += photos
    root = _common_folder(roots)
    names = sorted({file[len(root) :] for file in files})
    return PhotoList(root, names, left_out)


def _each(values: Sequence[str]) -> Iterator[str]:
    """One path or pattern at a time: lists are read, texts are cut at commas."""
    for value in values:
        if value.endswith(".txt"):
            try:
                lines = read_text(value).splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--images={value}: cannot read this list ({error})") from error
            yield from (line.strip() for line in lines if line.strip())
        elif "," in value and not (is_remote(value) or os.path.exists(value)):
            yield from (part for part in value.split(",") if part)
        elif "," in value and is_remote(value) and not to_epath(value).exists():
            yield from (part for part in value.split(",") if part)
        else:
            yield value


def _find(value: str) -> tuple[str, list[str], bool]:
    """Folder with a slash at its end, files in it, and whether `value` is the name of a file."""
    path = value if is_remote(value) else os.path.abspath(os.path.expanduser(value))
    if _WILD & set(value) and not (not is_remote(path) and os.path.exists(path)):
        return _matching(path)
    target = to_epath(path)
    if target.is_dir():
        folder = path.rstrip("/") + "/"
        files = _below_address(folder) if is_remote(path) else _below(folder)
        return folder, list(files), False
    if not target.exists():
        raise UserError(f"--images={value}: no such file or folder")
    return path[: path.rindex("/") + 1], [path], True


def _matching(pattern: str) -> tuple[str, list[str], bool]:
    """As `_find`, of a pattern."""
    first_wild = min(place for place, letter in enumerate(pattern) if letter in _WILD)
    folder = pattern[: pattern.rindex("/", 0, first_wild) + 1]
    if not is_remote(pattern):
        found = [file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)]
        return folder, found, False
    wanted = pattern[len(folder) :].split("/")
    deep = "**" in wanted
    found = [
        file
        for file in _below_address(folder, None if deep else len(wanted))
        if _fits(file[len(folder) :].split("/"), wanted)
    ]
    return folder, found, False


def _below(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _below_address(folder: str, depth: int | None = None) -> Iterator[str]:
    """Files behind an address; `depth` 1: in the folder itself only."""
    for path in to_epath(folder).iterdir():
        if path.name.startswith("."):
            continue
        if split_extension(path.name)[1] or not path.is_dir():
            yield folder + path.name
        elif depth is None or depth > 1:
            yield from _below_address(f"{folder}{path.name}/", None if depth is None else depth - 1)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, in which ** is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
    )


def _common_folder(roots: Sequence[str]) -> str:
    kinds = {root.split("://")[0] if is_remote(root) else "" for root in roots}
    if len(kinds) > 1:
        raise UserError(f"--images: found {roots[0]} and {roots[-1]}, expected one kind of storage")
    common = os.path.commonprefix(list(roots))
    return common[: common.rindex("/") + 1]
