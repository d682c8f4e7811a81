"""Names of photos as annotations store them: made comparable, and held against files found.

Annotations come from other machines: with backslashes, absolute paths, percent signs, composed or
decomposed letters, other extensions. What they say about folders is kept, and a file that it
contradicts is another photo.
"""

import functools
import os
import unicodedata
from urllib.parse import unquote

# In order of preference where files of one name have several: VOC has .png masks beside photos.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

Rank = tuple[int, ...]

_LOCAL_FILES = "/data/local-files/?d="  # how Label Studio names files of a mounted folder


def normal(path: str) -> str:
    """A path with slashes and composed letters."""
    path = path.replace("\\", "/")
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def split_extension(path: str) -> tuple[str, str]:
    """Path and extension in small letters, where that is one of a photo."""
    stem, extension = os.path.splitext(path)
    return (stem, extension.lower()) if extension.lower() in EXTENSIONS else (path, "")


def photo_name(image_id: str, file: str) -> str:
    """File name without extension, the id where the source tells no file."""
    return os.path.splitext(os.path.basename(normal(file)))[0] if file else image_id


def readings(file: str) -> tuple[str, ...]:
    """What a stored path can mean: as it is written, then with its percent signs decoded."""
    if _LOCAL_FILES in file:
        file = file.split(_LOCAL_FILES)[1]
    if file.startswith(("http://", "https://")):
        file = file.split("?")[0].split("#")[0]
    written = normal(file)
    while written.startswith("./"):
        written = written[2:]
    decoded = normal(unquote(written)) if "%" in written else written
    return (written,) if decoded == written else (written, decoded)


def rank(path: str, file: str, *, folders: bool = True) -> Rank | None:
    """How well a file fits a stored path, less is better, None = it is another photo.

    Args:
      path: of the file, relative and `normal`.
      file: path that the annotations store.
      folders: whether the folders of one must be the end of the other's.
    """
    stem, extension = split_extension(path)
    order = EXTENSIONS.index(extension) if extension else len(EXTENSIONS)
    if _name(stem) == file:  # an id, as of most of the millions of OpenImages
        return (0, int(stem != file), 1, order)
    for place, (wanted, kind) in enumerate(stems(file)):
        if _same_end(stem, wanted) if folders else _name(stem) == _name(wanted):
            return (place, int(stem != wanted), int(extension != kind), order)
    return None


@functools.lru_cache(maxsize=1024)
def stems(file: str) -> tuple[tuple[str, str], ...]:
    """Path without extension and extension of each reading of a stored path.

    What follows the last dot may be part of the name (`x.rf.12`) or an extension that no photo
    here has (`x.heic`).
    """
    known = [split_extension(reading) for reading in readings(file)]
    others = [(os.path.splitext(path)[0], "") for path, extension in known if not extension]
    return tuple(dict.fromkeys(known + others))


def nearness(path: str, other: str) -> Rank:
    """How far the folder of a file is from that of another, less is nearer."""
    mine, theirs = path.split("/")[:-1], other.split("/")[:-1]
    common = len(os.path.commonprefix([mine, theirs]))
    return (-common, len(mine) - common)


def _same_end(path: str, hint: str) -> bool:
    return path == hint or path.endswith("/" + hint) or hint.endswith("/" + path)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
