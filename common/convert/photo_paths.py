"""Where the photos of a set are, and their sizes."""

from pathlib import Path

import numpy as np

from common.convert.annotations import Annotations, ImageTable
from common.convert.options import Options
from common.convert.photos import find_photos, photo_name, read_sizes
from common.convert.report import DROPPED, EXAMPLES, REPAIRED, Report
from common.io.errors import UserError

# Headers of up to so many photos are read without being asked for (about 0.1 ms each).
_SIZES_UNASKED = 200_000


def locate_photos(
    annotations: Annotations, options: Options, report: Report, candidates: set[int]
) -> tuple[list[str | None], np.ndarray, str]:
    """Where the photo of each image is, and how large.

    Args:
      annotations: the images, with file names and sizes as far as the source tells them.
      options: where to look, and whether to read the photos.
      report: gets images without photo and photos that cannot be read.
      candidates: images without annotations, which are dropped without photo.

    Returns:
      Path of each image (None = drop the image), (N, 2) heights and widths, 0 where unknown, and
      the root of the paths.

    Raises:
      UserError: no such folder, or none of the photos is there.
    """
    images = annotations.images
    sizes = np.zeros((len(images), 2), np.int32)
    for i, size in images.sizes.items():
        sizes[i] = size
    if annotations.photo_folder is not None:
        new = [images.ids[i] for i in sorted(candidates)]
        report.add("split id without photo", DROPPED, str(options.splits), new)
        files = [images.files.get(i) for i in range(len(images))]
        return [file and f"images/{file}" for file in files], sizes, ""
    if options.image_pattern:
        pattern = options.image_pattern
        return [pattern.format(id=name) for name in images.ids], sizes, options.images or ""
    if options.images is not None and "://" in options.images:
        return [_unseen(images, i) for i in range(len(images))], sizes, options.images
    folder = Path(options.images) if options.images is not None else annotations.search
    if options.images is not None and not folder.is_dir():
        raise UserError(f"--images={folder}: no such folder")
    paths, seen = find_photos(folder, images.ids, images.files)
    located = [i for i, path in enumerate(paths) if path is not None]
    if not located and options.images is None:
        print(f"no photos below {folder}: the index is written without them", flush=True)
        new = [images.ids[i] for i in sorted(candidates)]
        report.add("split id without photo", DROPPED, str(options.splits), new)
        paths = [None if i in candidates else _unseen(images, i) for i in range(len(images))]
        return paths, sizes, ""
    if not located:
        example = photo_name(images.ids[0], images.files.get(0, "")) if images.ids else ""
        raise UserError(
            f"{folder}: none of the {len(images):,} photos is there ({seen:,} other photos seen); "
            f"looked for names like {example!r} with .jpg, .jpeg or .png"
        )
    missing = [i for i, path in enumerate(paths) if path is None]
    annotated = [images.ids[i] for i in missing if i not in candidates]
    report.add("photo not found", DROPPED, annotations.source, annotated)
    unknown = [images.ids[i] for i in missing if i in candidates]
    report.add("split id without photo", DROPPED, str(options.splits), unknown)
    ask = options.read_sizes
    if options.check_photos or (len(located) <= _SIZES_UNASKED if ask is None else ask):
        _check_sizes(annotations, options, report, folder, paths, sizes, located)
    return paths, sizes, str(folder.absolute())


def _check_sizes(
    annotations: Annotations,
    options: Options,
    report: Report,
    folder: Path,
    paths: list[str | None],
    sizes: np.ndarray,
    located: list[int],
) -> None:
    """Reads the photos' sizes into `sizes`; photos that cannot be read lose their path."""
    read, readable = read_sizes(folder, [paths[i] or "" for i in located], options.check_photos)
    rows = np.array(located)
    bad = rows[~readable]
    report.add(
        "unreadable photo",
        DROPPED,
        [str(folder / str(paths[i])) for i in bad],
        [annotations.images.ids[i] for i in bad],
    )
    for i in bad:
        paths[i] = None
    told = sizes[rows]
    other = rows[readable & (told > 0).all(1) & (told != read).any(1)]
    pairs = dict(zip(located, zip(told.tolist(), read.tolist(), strict=True), strict=True))
    notes = [
        "annotated {}x{}, photo {}x{} (height x width)".format(*pairs[i][0], *pairs[i][1])
        for i in other[:EXAMPLES].tolist()
    ]
    if annotations.mask_spool is None:  # else: polygons are in pixels of the annotated size
        sizes[rows] = read
    else:
        sizes[rows] = np.where((told > 0).all(1, keepdims=True), told, read)
    report.add(
        "size in the annotations is not that of the photo",
        REPAIRED,
        [str(folder / str(paths[i])) for i in other],
        [annotations.images.ids[i] for i in other],
        notes,
    )


def _unseen(images: ImageTable, index: int) -> str:
    return images.files.get(index) or f"{images.ids[index]}.jpg"
