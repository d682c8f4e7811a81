"""Finding photos below a folder, and reading their sizes from the headers."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from PIL import ExifTags

from common.data.image_file import BROKEN, open_image
from common.io.parallel import map_ordered
from common.io.progress import Progress

# In order of preference where files of one name have several: VOC has .png masks beside photos.
EXTENSIONS = (".jpg", ".jpeg", ".png")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def walk(folder: Path) -> Iterator[str]:
    """Relative paths of all files below a folder, in a fixed order, links followed."""
    pending = [""]
    while pending:
        inside = pending.pop()
        with os.scandir(folder / inside) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        folders = []
        for entry in listed:
            path = os.path.join(inside, entry.name)
            if entry.is_dir():
                folders.append(path)
            else:
                yield path
        pending += reversed(folders)


def find_photos(
    folder: Path, ids: Sequence[str], files: Mapping[int, str]
) -> tuple[list[str | None], int]:
    """Finds the photo of each image by one listing of a folder.

    Args:
      folder: searched with everything below it.
      ids: of the images; names of their photos where `files` has none.
      files: index -> path in the source annotations. Of several photos of one name, the one that
        ends with that path wins, then .jpg before .png, then the first by path.

    Returns:
      Path relative to `folder` (None = not found) of each image, and how many photos were seen.
    """
    wanted: dict[str, list[int]] = {}
    for i, image_id in enumerate(ids):
        wanted.setdefault(photo_name(image_id, files.get(i, "")), []).append(i)
    paths: list[str | None] = [None] * len(ids)
    rank: dict[int, tuple[bool, int]] = {}
    seen = 0
    progress = Progress(0, what=f"listing {folder}", unit="photos")
    for path in walk(folder):
        stem, extension = os.path.splitext(os.path.basename(path))
        extension = extension.lower()
        if extension not in EXTENSIONS:
            continue
        seen += 1
        progress.report(seen)
        for image in wanted.get(stem, ()):
            fits = image in files and _ends_with(path, files[image])
            quality = (not fits, EXTENSIONS.index(extension))
            if paths[image] is None or quality < rank[image]:
                paths[image] = path
                rank[image] = quality
    return paths, seen


def photo_name(image_id: str, file: str) -> str:
    """File name without extension, the id where the source tells no file."""
    return os.path.splitext(os.path.basename(file))[0] if file else image_id


def read_sizes(
    folder: Path, paths: Sequence[str], decode: bool = False
) -> tuple[Int32[np.ndarray, "N 2"], Bool[np.ndarray, " N"]]:
    """Sizes of photos after EXIF rotation, from their headers.

    Args:
      folder: root of the paths.
      paths: of the photos.
      decode: decode every pixel too, which finds truncated files.

    Returns:
      Height and width of each photo (0 when unreadable), and whether it is readable.
    """
    sizes = np.zeros((len(paths), 2), np.int32)
    progress = Progress(len(paths), what="reading photos", unit="photos")
    results = map_ordered(lambda path: _size(folder / path, decode), paths, ahead=256)
    for i, size in enumerate(results):
        sizes[i] = size
        progress.report(i + 1)
    return sizes, np.all(sizes > 0, axis=1)


def _size(path: Path, decode: bool) -> tuple[int, int]:
    try:
        with open_image(path) as image:
            width, height = image.size
            # PIL decodes a whole PNG to look for EXIF behind its pixels: that is not read.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            sideways = exif.get(ExifTags.Base.Orientation) in _SIDEWAYS
            if decode:
                image.load()
    except BROKEN:  # the caller reports their names; an ImageError is a ValueError
        return 0, 0
    return (width, height) if sideways else (height, width)


def _ends_with(path: str, hint: str) -> bool:
    path, hint = path.replace(os.sep, "/"), hint.replace(os.sep, "/").lstrip("./")
    return path == hint or path.endswith("/" + hint) or hint.endswith("/" + path)
