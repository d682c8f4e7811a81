"""YOLO folders: photos in `images/`, a text file of the same name in `labels/` or beside each.

Classes and splits stand in `data.yaml`, in `classes.txt` (Label Studio: one split) or in `obj.data`
and `obj.names` (CVAT).

A line is `class x y width height` (centre and size, shares of the photo) or, of sets for
segmentation, `class x1 y1 x2 y2 x3 y3 ...`, a polygon. Splits are the folders, lists (.txt) or both
that `train`, `val` and `test` name; a photo without text file has no objects. Ids are the photos'
names without extension, their paths where two have one name, and those with extension where that
alone tells two photos apart.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from common.convert.annotations import (
    BOX_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    Annotations,
    Columns,
    ImageTable,
)
from common.convert.classes import read_hierarchy
from common.convert.cleaning import check_layout
from common.convert.photos import read_sizes
from common.convert.report import DROPPED, NOTED, Report
from common.convert.yolo_config import class_names, read_config, read_text_file, split_photos
from common.data.class_list import read_class_list
from common.data.photo_names import split_extension
from common.io.errors import UserError
from common.io.progress import Progress


def read_yolo(
    source: Path,
    report: Report,
    spool_folder: Path,
    *,
    classes: Path | None = None,
    hierarchy: Path | None = None,
) -> Annotations:
    """Reads a YOLO data set.

    Args:
      source: the folder, or its .yaml file.
      report: gets photos without text file, and text files without photo.
      spool_folder: for temporary files.
      classes: class list instead of the names in the file.
      hierarchy: optional hierarchy of the class names.

    Raises:
      UserError: a file is missing or broken, or a line is no object.
    """
    config, content = read_config(source)
    numbers, names = class_names(config, content)
    if classes is not None:
        names = read_class_list(classes).names
        numbers = list(range(len(names)))
    photos = split_photos(config, content)
    everything = [path for paths in photos.values() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in everything]))
    relative = [path.relative_to(root).as_posix() for path in everything]
    sizes, _ = read_sizes(root, relative)
    ids = _ids(relative)
    images, files = ImageTable(), list[str]()
    columns, splits = Columns(BOX_COLUMNS | MASK_COLUMNS), dict[str, np.ndarray]()
    order = {number: i for i, number in enumerate(numbers)}
    progress = Progress(len(everything), what="reading labels", unit="files")
    spool = spool_folder / "masks.spool"
    has_masks = False
    done = 0
    with open(spool, "wb") as masks:
        for split, paths in photos.items():
            members = []
            for path in paths:
                name = ids[relative[done]]
                is_new = images.find(name) < 0
                index = images.add(name)
                members.append(index)
                if is_new:
                    images.files[index] = relative[done]
                    height, width = sizes[done].tolist()
                    images.sizes[index] = (height, width)
                    labels = _label_file(path)
                    if labels is None:
                        report.add("photo without text file", NOTED, str(path), [name])
                    else:
                        rows, file = _read_lines(labels), len(files)
                        has_masks |= _add(rows, index, file, (width, height), order, columns, masks)
                        files.append(str(labels))
                done += 1
                progress.report(done)
            splits[split] = np.unique(np.array(members, np.int64))
    unused = _unused(everything, files)
    report.add("text file of no photo in a split", DROPPED, unused, [Path(f).stem for f in unused])
    boxes = columns.take()
    check_layout(boxes["box"], str(config), "x, y, width, height")
    if not has_masks:
        for column in MASK_COLUMNS:
            del boxes[column]
    counts = Counter(names)
    return Annotations(
        name="yolo",
        source=str(config),
        class_labels=[
            f"{name} ({number})" if counts[name] > 1 else name
            for name, number in zip(names, numbers, strict=True)
        ],
        class_names=names,
        hierarchy=read_hierarchy(hierarchy, names),
        images=images,
        splits=splits,
        boxes=boxes,
        labels=Columns(LABEL_COLUMNS).take(),
        files=files,
        search=root,
        mask_spool=spool if has_masks else None,
        extra={"exhaustive": True, "category_ids": numbers, "image_id": "file_stem"},
    )


def _ids(paths: Sequence[str]) -> dict[str, str]:
    """The shortest name of each photo that no other one has."""
    found = set(paths)
    stems = Counter(split_extension(path)[0] for path in found)
    names = Counter(os.path.basename(split_extension(path)[0]) for path in found)
    ids = {}
    for path in found:
        stem = split_extension(path)[0]
        name = os.path.basename(stem)
        ids[path] = name if names[name] == 1 else stem if stems[stem] == 1 else path
    return ids


def _label_places(photo: Path) -> list[str]:
    """Where the text file of a photo may be: in `labels` for `images`, or beside it."""
    stem = split_extension(str(photo))[0]
    head, marker, tail = stem.rpartition("/images/")
    return [*([f"{head}/labels/{tail}.txt"] if marker else []), f"{stem}.txt"]


def _label_file(photo: Path) -> Path | None:
    return next((Path(name) for name in _label_places(photo) if os.path.isfile(name)), None)


def _unused(photos: Sequence[Path], files: Sequence[str]) -> list[str]:
    """Text files with objects, beside those of the photos, that no photo has."""
    folders = {os.path.dirname(place) for photo in photos for place in _label_places(photo)}
    unused = []
    for folder in sorted(filter(os.path.isdir, folders)):
        texts = {entry.path for entry in os.scandir(folder) if entry.name.endswith(".txt")}
        unused += [path for path in sorted(texts - set(files)) if _has_objects(Path(path))]
    return [os.fsencode(path).decode("utf-8", "backslashreplace") for path in unused]


def _has_objects(path: Path) -> bool:
    """Whether it is a text file of a photo, and no list of classes or photos."""
    try:
        return bool(_read_lines(path))
    except UserError:
        return False


def _read_lines(path: Path) -> list[tuple[int, int, list[float]]]:
    """Line number, class number and coordinates of each object."""
    rows = []
    for line, text in enumerate(read_text_file(path).splitlines(), 1):
        if not (words := text.split()):
            continue
        try:
            numbers = [float(word) for word in words]
            if len(numbers) not in (5, *range(7, 1 << 20, 2)) or not np.isfinite(numbers).all():
                raise ValueError(f"{len(numbers)} numbers")
            class_ = int(numbers[0])
            if class_ != numbers[0] or not 0 <= class_ < 1 << 31:
                raise ValueError(f"class {words[0]:.20}")
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{path}, row {line}: found {text[:60]!r} ({error}), expected class x y width "
                "height, or class and a polygon of three or more points"
            ) from error
        rows.append((line, class_, numbers[1:]))
    return rows


def _add(
    rows: list[tuple[int, int, list[float]]],
    image: int,
    file: int,
    size: tuple[int, int],
    order: dict[int, int],
    columns: Columns,
    masks: IO[bytes],
) -> bool:
    """Adds the objects of a photo of this width and height; whether there are polygons."""
    boxes, starts, lengths, checks = [], [], [], []
    for _, _, numbers in rows:
        text = b""
        if len(numbers) == 4:
            x, y, width, height = numbers
            boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        else:
            points = np.reshape(numbers, (-1, 2))
            boxes.append([*points.min(0).tolist(), *points.max(0).tolist()])
            if all(size):
                pixels = (points * size).round(3).reshape(-1).tolist()
                text = json.dumps([pixels], separators=(",", ":")).encode()
        starts.append(masks.tell())
        lengths.append(len(text))
        checks.append(zlib.crc32(text))
        masks.write(text)
    columns.append(
        **{"class": [order.get(class_, -1) for _, class_, _ in rows]},
        image=np.full(len(rows), image, np.int32),
        box=np.reshape(boxes, (-1, 4)),
        flags=np.zeros(len(rows), np.uint8),
        file=np.full(len(rows), file, np.int32),
        row=[line for line, _, _ in rows],
        mask_start=starts,
        mask_length=lengths,
        mask_check=checks,
    )
    return any(lengths)
