"""Where the photos of a set are, and their sizes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.convert.annotations import Annotations, ImageTable
from common.convert.options import Options
from common.convert.photos import Found, find_photos, read_sizes
from common.convert.report import DROPPED, EXAMPLES, NOTED, REPAIRED, Report
from common.data.photo_names import EXTENSIONS, normal, photo_name
from common.io.errors import UserError
from common.masks.dataset_masks import same_shape

# Headers of up to so many photos are read without being asked for (about 0.1 ms each).
_SIZES_UNASKED = 200_000
OTHER_SHAPE = "photo of another shape than annotated (turned or cropped since?)"


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
    found = find_photos(
        folder, images.ids, images.files, annotations.near, folders=options.match_photos == "path"
    )
    if annotations.other_files:
        _try_other_files(annotations, folder, found, report)
    paths = found.paths
    located = [i for i, path in enumerate(paths) if path is not None]
    if not (located or found.ambiguous or found.contradicted) and options.images is None:
        print(f"no photos below {folder}: the index is written without them", flush=True)
        new = [images.ids[i] for i in sorted(candidates)]
        report.add("split id without photo", DROPPED, str(options.splits), new)
        paths = [None if i in candidates else _unseen(images, i) for i in range(len(images))]
        return paths, sizes, ""
    if not located:
        raise UserError(
            f"{folder}: none of the {len(images):,} photos is there; {_hint(found, images)}"
        )
    _report_missing(annotations, options, report, candidates, found)
    _note_shared(annotations, report, paths)
    ask = options.read_sizes
    if not (options.check_photos or (len(located) <= _SIZES_UNASKED if ask is None else ask)):
        located = [i for i in located if i in annotations.unsized]
    if located:
        _check_sizes(annotations, options, report, folder, paths, sizes, located)
    return paths, sizes, str(folder.absolute())


def _try_other_files(annotations: Annotations, folder: Path, found: Found, report: Report) -> None:
    """Finds photos by the second of two names; where each name has a photo, neither is taken."""
    images, near = annotations.images, annotations.near or {}
    rows = sorted(annotations.other_files)
    other = find_photos(
        folder,
        [images.ids[i] for i in rows],
        {k: annotations.other_files[i] for k, i in enumerate(rows)},
        {k: near.get(i, "") for k, i in enumerate(rows)},
    )
    used = []
    for i, path in zip(rows, other.paths, strict=True):
        first = found.paths[i]
        if path is None or path == first or i in found.ambiguous:
            continue
        if first is None:
            found.paths[i] = path
            found.contradicted.pop(i, None)
            used.append(i)
        else:
            found.paths[i], found.ambiguous[i] = None, (first, path)
    notes = [f"stored {images.files[i]}, found {found.paths[i]}" for i in used[:EXAMPLES]]
    report.add(
        "photo called as the annotation file is, not as it says",
        REPAIRED,
        annotations.source,
        [images.ids[i] for i in used],
        notes,
    )


def _report_missing(
    annotations: Annotations, options: Options, report: Report, candidates: set[int], found: Found
) -> None:
    """Counts images without photo, by what is known of them."""
    images = annotations.images
    missing = [i for i, path in enumerate(found.paths) if path is None]
    told = {
        "several photos fit": [i for i in missing if i in found.ambiguous],
        "photo not found where the annotations say, one of its name elsewhere": [
            i for i in missing if i in found.contradicted
        ],
        "photo not found": [
            i
            for i in missing
            if not (i in candidates or i in found.ambiguous or i in found.contradicted)
        ],
    }
    for reason, rows in told.items():
        notes = [_note(images, found, i) for i in rows[:EXAMPLES]]
        report.add(reason, DROPPED, annotations.source, [images.ids[i] for i in rows], notes)
    others = candidates - found.ambiguous.keys() - found.contradicted.keys()
    unknown = [images.ids[i] for i in missing if i in others]
    report.add("split id without photo", DROPPED, str(options.splits), unknown)


def _note(images: ImageTable, found: Found, image: int) -> str:
    stored = images.files.get(image) or images.ids[image]
    if image in found.ambiguous:
        return f"stored {stored}, found {' and '.join(found.ambiguous[image])}"
    if image in found.contradicted:
        return f"stored {stored}, found {found.contradicted[image]}"
    return f"stored {stored}"


def _hint(found: Found, images: ImageTable) -> str:
    """What may help where no photo is found at all."""
    if found.ambiguous or found.contradicted:
        image = next(iter(found.ambiguous or found.contradicted))
        return (
            f"{_note(images, found, image)}: a photo in another folder than the annotations say is "
            "another photo (--images=FOLDER of the photos themselves, or --match_photos=name where "
            "no two have one name)"
        )
    example = photo_name(images.ids[0], images.files.get(0, "")) if images.ids else ""
    return (
        f"{found.seen:,} other photos seen; looked for names like {example!r} with "
        f"{', '.join(EXTENSIONS)}"
    )


def _note_shared(annotations: Annotations, report: Report, paths: Sequence[str | None]) -> None:
    """Tells photos that several image ids stand for."""
    owner: dict[str, int] = {}
    ids = annotations.images.ids
    shared = [
        (i, first)
        for i, path in enumerate(paths)
        if path is not None and (first := owner.setdefault(path, i)) != i
    ]
    notes = [f"{paths[i]} is also image {ids[first]}" for i, first in shared[:EXAMPLES]]
    report.add(
        "photo that has another image id, too",
        NOTED,
        annotations.source,
        [ids[i] for i, _ in shared],
        notes,
    )


def _check_sizes(
    annotations: Annotations,
    options: Options,
    report: Report,
    folder: Path,
    paths: list[str | None],
    sizes: np.ndarray,
    located: list[int],
) -> None:
    """Reads the photos' sizes into `sizes`.

    Photos that cannot be read lose their path, and so do those of another shape than annotated: the
    boxes are shares of another picture, of one before it was turned or cropped, for example. (One
    that is annotated as stored, and shown turned by its EXIF mark, is read as stored.)
    """
    rows = np.array(located)
    told = sizes[rows]
    files = [paths[i] or "" for i in located]
    read, readable = read_sizes(folder, files, options.check_photos, told)
    bad = rows[~readable]
    report.add(
        "unreadable photo",
        DROPPED,
        [str(folder / str(paths[i])) for i in bad],
        [annotations.images.ids[i] for i in bad],
    )
    for i in bad:
        paths[i] = None
    other = readable & (told > 0).all(1) & (told != read).any(1)
    turned = other.copy()
    turned[other] = [not same_shape(*pair) for pair in zip(told[other], read[other], strict=True)]
    pairs = dict(zip(located, zip(told.tolist(), read.tolist(), strict=True), strict=True))
    for reason, action, where in (
        (OTHER_SHAPE, DROPPED, turned),
        ("size in the annotations is not that of the photo", REPAIRED, other & ~turned),
    ):
        found = rows[where].tolist()
        notes = [
            "annotated {}x{}, photo {}x{} (height x width)".format(*pairs[i][0], *pairs[i][1])
            for i in found[:EXAMPLES]
        ]
        files = [str(folder / str(paths[i])) for i in found]
        report.add(reason, action, files, [annotations.images.ids[i] for i in found], notes)
    for i in rows[turned].tolist():
        paths[i] = None
    if annotations.mask_spool is None:  # else: polygons are in pixels of the annotated size
        sizes[rows] = read
    else:
        sizes[rows] = np.where((told > 0).all(1, keepdims=True), told, read)


def _unseen(images: ImageTable, index: int) -> str:
    file = images.files.get(index)
    return normal(file) if file else f"{images.ids[index]}.jpg"
