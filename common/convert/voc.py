"""Pascal VOC: XML files anywhere below a folder, and the photos that they name.

The photo is the nearest one called as <filename> says, else (reported) as the XML file is called.
Where both are there and are two photos, neither is taken.

Splits are the files of ImageSets/Main (those that list ids alone), else everything is `train`.
Objects marked `difficult` are kept as ordinary boxes; `part` boxes inside objects are not read.

Pixels: the official sets count from 1 and include the last pixel, so xmin=1, xmax=W is the whole
width; everybody else's tools write edges. 'auto' subtracts 1 from xmin and ymin only in files whose
<source><database> names the VOC. Guessing by the smallest coordinate does not work: popular tools
never write 0.
"""

import os
import re
from pathlib import Path

import numpy as np

from common.convert.annotations import BOX_COLUMNS, LABEL_COLUMNS, Annotations, Columns, ImageTable
from common.convert.classes import read_hierarchy
from common.convert.cleaning import check_pixels
from common.convert.photos import walk
from common.convert.report import REPAIRED, Report
from common.convert.splits import ImageFinder, read_split_list
from common.convert.voc_file import read_voc_file
from common.data.class_list import read_class_list
from common.data.photo_names import normal, photo_name, split_extension
from common.io.errors import UserError
from common.io.progress import Progress

_OF_CLASS = re.compile(r"\S+\s+(-1|0|1)")
_SPLIT_FILE = re.compile(r"(^|.*/)ImageSets/Main/[^/]+\.txt")


def read_voc(
    source: Path,
    report: Report,
    *,
    classes: Path | None = None,
    hierarchy: Path | None = None,
    one_based: str = "auto",
) -> Annotations:
    """Reads all VOC files below a folder.

    Args:
      source: the folder.
      report: unused rows go here when the boxes are cleaned.
      classes: class list; without it the names that occur, sorted.
      hierarchy: optional hierarchy of the class names.
      one_based: 'true', 'false' or 'auto', see above.

    Raises:
      UserError: no XML files, broken ones, or boxes that do not fit their photos.
    """
    if not source.is_dir():
        raise UserError(f"--source={source}: no such folder")
    listing = [path.replace(os.sep, "/") for path in walk(source)]
    xml_paths = [path for path in listing if path.lower().endswith(".xml")]
    if not xml_paths:
        raise UserError(f"--source={source}: no .xml files below it")
    stems = [Path(path).stem for path in xml_paths]
    unique = len(set(stems)) == len(stems)
    images, files = ImageTable(), list[str]()
    near, others = dict[int, str](), dict[int, str]()
    rows, names, corners, flags, sizes = [], [], [], [], []
    progress = Progress(len(xml_paths), what="reading XML", unit="files")
    for path, stem in zip(xml_paths, stems, strict=True):
        content = read_voc_file(source / path, report)
        if content is None:
            continue
        index = images.add(stem if unique else os.path.splitext(path)[0])
        images.files[index] = content.filename or f"{stem}.jpg"
        images.sizes[index] = content.size
        near[index] = normal(path)
        if split_extension(images.files[index])[0] != stem:
            others[index] = f"{stem}{split_extension(images.files[index])[1]}"
        shift = _shift(content.database, one_based)
        for item in content.objects:
            rows.append((index, len(files), item.number))
            names.append(item.name)
            corners.append([item.box[0] - shift, item.box[1] - shift, *item.box[2:]])
            sizes.append(content.size)
            flags.append(item.flags)
        files.append(str(source / path))
        progress.report(len(files))
    if not files:
        raise UserError(f"--source={source}: none of {len(xml_paths)} .xml files is Pascal VOC")
    labels, class_names = read_class_list(classes)[:2] if classes else (sorted(set(names)),) * 2
    if not labels:
        raise UserError(
            f"{source}: no objects and no --classes: the class list would be empty "
            f"({report.most_frequent()})"
        )
    class_index = {label: i for i, label in enumerate(labels)}
    used = {name for name in names if name in class_index}
    if names and not used:
        raise UserError(
            f"{classes}: no class of the list occurs; objects are called {sorted(set(names))[:5]}"
        )
    columns = Columns(BOX_COLUMNS)
    if rows:
        pixels = np.array(corners, np.float64)
        height_width = np.array(sizes, np.float64)
        check_pixels(pixels, height_width, str(source), corners=True)
        row_array = np.array(rows, np.int64)
        columns.append(
            **{"class": [class_index.get(name, -1) for name in names]},
            image=row_array[:, 0],
            file=row_array[:, 1],
            row=row_array[:, 2],
            box=pixels / np.where(height_width == 0, 1, height_width)[:, [1, 0, 1, 0]],
            flags=flags,
        )
    return Annotations(
        name="voc",
        source=str(source),
        class_labels=labels,
        class_names=class_names,
        hierarchy=read_hierarchy(hierarchy, labels),
        images=images,
        splits=_splits(source, listing, images, report),
        boxes=columns.take(),
        labels=Columns(LABEL_COLUMNS).take(),
        files=files,
        search=source,
        near=near,
        other_files=others,
        unsized={i for i, size in images.sizes.items() if not all(size)},
        extra={"exhaustive": True},
    )


def _shift(database: str, one_based: str) -> int:
    """What is taken off xmin and ymin."""
    return int("VOC" in database if one_based == "auto" else one_based == "true")


def _splits(
    source: Path, listing: list[str], images: ImageTable, report: Report
) -> dict[str, np.ndarray]:
    annotated, find = np.arange(len(images)), ImageFinder(images)
    splits: dict[str, list[int]] = {}
    for path in listing:
        if not _SPLIT_FILE.fullmatch(path):
            continue
        lines = read_split_list(source / path)
        places = [find(line) for line in lines]
        if any(
            place < 0 and _OF_CLASS.fullmatch(line)
            for line, place in zip(lines, places, strict=True)
        ):
            continue  # the lists of one class: "id 1", "id -1"
        members = splits.setdefault(Path(path).stem, [])
        for line, place in zip(lines, places, strict=True):
            members.append(images.add(photo_name("", line)) if place < 0 else place)
        repeats = len(lines) - len(set(lines))
        report.add("id twice in a split", REPAIRED, str(source / path), [Path(path).stem] * repeats)
    if not splits:
        return {"train": annotated}
    return {name: np.unique(np.array(members, np.int64)) for name, members in splits.items()}
