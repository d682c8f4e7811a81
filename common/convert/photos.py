"""Finding photos below a folder, and reading their sizes from the headers."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from PIL import ExifTags

from common.data import photo_names
from common.data.image_file import BROKEN, open_image
from common.data.images import is_as_stored
from common.io.parallel import map_ordered
from common.io.progress import Progress

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def walk(folder: Path) -> Iterator[str]:
    """Relative paths of all files below a folder, in a fixed order, links followed.

    Passed over are links to a folder around them, and names that are no UTF-8, which is said.
    """
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    nameless = []
    while pending:
        inside, around = pending.pop()
        status = os.stat(folder / inside)
        if (own := (status.st_dev, status.st_ino)) in around:
            continue
        with os.scandir(folder / inside) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        folders = []
        for entry in listed:
            path = os.path.join(inside, entry.name)
            if not _is_utf8(entry.name):
                nameless.append(ascii(path))
            elif entry.is_dir():
                folders.append((path, (*around, own)))
            elif entry.is_file():  # no pipe, which would wait for ever, and no broken link
                yield path
        pending += reversed(folders)
    if nameless:
        print(
            f"{folder}: {len(nameless)} files or folders have names that are no UTF-8 and are "
            f"passed over (first {nameless[0]})",
            flush=True,
        )


def _is_utf8(name: str) -> bool:
    """Whether a name of the file system is text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass
class Found:
    """What a listing of a folder says about the photos of a set.

    Attributes:
      paths: of each image, relative to the folder; None = not found.
      seen: how many photos are in the folder.
      ambiguous: images without path for which several photos fit alike, and two of these.
      contradicted: images without path, and a photo of that name in another folder than stored.
    """

    paths: list[str | None]
    seen: int = 0
    ambiguous: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    contradicted: dict[int, str] = dataclasses.field(default_factory=dict)


def find_photos(
    folder: Path,
    ids: Sequence[str],
    files: Mapping[int, str],
    near: Mapping[int, str] | None = None,
    *,
    folders: bool = True,
) -> Found:
    """Finds the photo of each image by one listing of a folder.

    Args:
      folder: searched with everything below it.
      ids: of the images; names of their photos where `files` has none.
      files: index -> path in the source annotations. A photo in another folder than that is
        another photo. Of several that fit, the very path wins, then the extension that is stored,
        then .jpg before .png; if then several are left, none is taken.
      near: index -> path of the file of annotations, relative to `folder`: the nearest photo of
        the name is meant, and of one photo only the nearest file of annotations.
      folders: False = photos are known by their names alone.
    """
    wanted: dict[str, list[int]] = {}
    for i, image_id in enumerate(ids):
        for key in _keys(image_id, files.get(i, "")):
            wanted.setdefault(key, []).append(i)
    found = Found([None] * len(ids))
    best: dict[int, photo_names.Rank] = {}
    progress = Progress(0, what=f"listing {folder}", unit="photos")
    for path in walk(folder):
        plain = photo_names.normal(path.replace(os.sep, "/"))
        stem, extension = photo_names.split_extension(plain)
        if not extension:
            continue
        found.seen += 1
        progress.report(found.seen)
        for image in wanted.get(os.path.basename(stem), ()):
            rank = photo_names.rank(plain, files.get(image) or ids[image], folders=folders)
            if rank is None:
                found.contradicted.setdefault(image, path)
                continue
            if near is not None:
                rank = photo_names.nearness(plain, near.get(image, "")) + rank
            old = found.paths[image]
            if old is None or rank < best[image]:
                found.paths[image], best[image] = path, rank
                found.ambiguous.pop(image, None)
            elif rank == best[image] and not os.path.samefile(folder / old, folder / path):
                found.ambiguous.setdefault(image, (old, path))
    if near is not None:
        _keep_nearest(found, best)
    for image in found.ambiguous:
        found.paths[image] = None
    found.contradicted = {
        image: path
        for image, path in found.contradicted.items()
        if found.paths[image] is None and image not in found.ambiguous
    }
    return found


def _keys(image_id: str, file: str) -> list[str]:
    """Names without extension under which a photo is looked for."""
    if not file:
        return [photo_names.normal(image_id)]
    return list(dict.fromkeys(os.path.basename(stem) for stem, _ in photo_names.stems(file)))


def _keep_nearest(found: Found, best: dict[int, photo_names.Rank]) -> None:
    """Takes a photo away from all images but that whose annotations are nearest to it."""
    owner: dict[str, int] = {}
    for image in sorted(best, key=lambda image: best[image]):
        path = found.paths[image]
        if path is not None and best[owner.setdefault(path, image)][:2] < best[image][:2]:
            found.paths[image] = None
            found.contradicted[image] = path


def read_sizes(
    folder: Path,
    paths: Sequence[str],
    decode: bool = False,
    annotated: Int32[np.ndarray, "N 2"] | None = None,
) -> tuple[Int32[np.ndarray, "N 2"], Bool[np.ndarray, " N"]]:
    """Sizes of photos as batches show them (`common.data.images.open_photo`), from their headers.

    Args:
      folder: root of the paths.
      paths: of the photos.
      decode: decode every pixel too, which finds truncated files.
      annotated: heights and widths that the annotations give, 0 = unknown.

    Returns:
      Height and width of each photo (0 when unreadable), and whether it is readable.
    """
    sizes = np.zeros((len(paths), 2), np.int32)
    progress = Progress(len(paths), what="reading photos", unit="photos")
    told = np.zeros_like(sizes) if annotated is None else annotated
    results = map_ordered(
        lambda item: _size(folder / item[0], decode, item[1]),
        zip(paths, told.tolist(), strict=True),
        ahead=256,
    )
    for i, size in enumerate(results):
        sizes[i] = size
        progress.report(i + 1)
    return sizes, np.all(sizes > 0, axis=1)


def _size(path: Path, decode: bool, annotated: tuple[int, int]) -> tuple[int, int]:
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
    turned = sideways and not is_as_stored((height, width), annotated)
    return (width, height) if turned else (height, width)
