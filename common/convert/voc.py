"""Pascal VOC: XML files anywhere below a folder, photos of the same name near them.

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
from xml.etree import ElementTree

import numpy as np

from common.convert.annotations import BOX_COLUMNS, LABEL_COLUMNS, Annotations, Columns, ImageTable
from common.convert.classes import read_class_list, read_hierarchy
from common.convert.cleaning import check_pixels
from common.convert.photos import walk
from common.convert.report import Report
from common.data.dataset import OCCLUDED, TRUNCATED
from common.io.errors import UserError
from common.io.progress import Progress

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
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
    xml_paths = [path for path in listing if path.endswith(".xml")]
    if not xml_paths:
        raise UserError(f"--source={source}: no .xml files below it")
    stems = [Path(path).stem for path in xml_paths]
    unique = len(set(stems)) == len(stems)
    images, files = ImageTable(), list[str]()
    rows, names, corners, flags, sizes = [], [], [], [], []
    progress = Progress(len(xml_paths), what="reading XML", unit="files")
    for path, stem in zip(xml_paths, stems, strict=True):
        annotation = _parse(source / path)
        if annotation is None:
            continue
        index = images.add(stem if unique else path.removesuffix(".xml"))
        images.files[index] = re.sub(r"\.xml$", _extension(annotation), path)
        images.sizes[index] = size = _size(annotation, source / path)
        shift = _shift(annotation, one_based)
        for number, node in enumerate(annotation.findall("object"), 1):
            box = _box(node, f"{source / path}, object {number}")
            rows.append((index, len(files), number))
            names.append((node.findtext("name") or "").strip())
            corners.append([box[0] - shift, box[1] - shift, box[2], box[3]])
            sizes.append(size)
            flags.append(
                TRUNCATED * (_text(node, "truncated") == "1")
                | OCCLUDED * (_text(node, "occluded") == "1")
            )
        files.append(str(source / path))
        progress.report(len(files))
    if not files:
        raise UserError(f"--source={source}: none of {len(xml_paths)} .xml files is Pascal VOC")
    labels, class_names = read_class_list(classes) if classes else (sorted(set(names)),) * 2
    if not labels:
        raise UserError(f"{source}: no objects and no --classes: the class list would be empty")
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
            box=pixels / height_width[:, [1, 0, 1, 0]],
            flags=flags,
        )
    return Annotations(
        name="voc",
        source=str(source),
        class_labels=labels,
        class_names=class_names,
        hierarchy=read_hierarchy(hierarchy, labels),
        images=images,
        splits=_splits(source, listing, images),
        boxes=columns.take(),
        labels=Columns(LABEL_COLUMNS).take(),
        files=files,
        search=source,
        extra={"exhaustive": True},
    )


def _parse(path: Path) -> ElementTree.Element | None:
    """The root of a VOC file, None for other XML files."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: no valid XML ({error})") from error
    return root if root.tag == "annotation" else None


def _text(node: ElementTree.Element, tag: str) -> str:
    return (node.findtext(tag) or "").strip()


def _extension(annotation: ElementTree.Element) -> str:
    return os.path.splitext(_text(annotation, "filename"))[1] or ".jpg"


def _size(annotation: ElementTree.Element, path: Path) -> tuple[int, int]:
    try:
        height = int(float(_text(annotation, "size/height")))
        width = int(float(_text(annotation, "size/width")))
    except ValueError as error:
        raise UserError(f"{path}: no width and height in <size> ({error})") from error
    if height <= 0 or width <= 0:
        raise UserError(f"{path}: <size> says {width}x{height}; boxes in pixels need the size")
    return height, width


def _shift(annotation: ElementTree.Element, one_based: str) -> int:
    if one_based == "auto":
        return int("VOC" in _text(annotation, "source/database"))
    return int(one_based == "true")


def _box(node: ElementTree.Element, where: str) -> list[float]:
    try:
        return [float(_text(node, f"bndbox/{corner}")) for corner in _CORNERS]
    except ValueError as error:
        raise UserError(
            f"{where}: <bndbox> needs numbers {', '.join(_CORNERS)} ({error})"
        ) from error


def _splits(source: Path, listing: list[str], images: ImageTable) -> dict[str, np.ndarray]:
    annotated = np.arange(len(images))
    splits: dict[str, list[int]] = {}
    for path in listing:
        if not _SPLIT_FILE.fullmatch(path):
            continue
        lines = [line.split() for line in (source / path).read_text(encoding="utf-8").splitlines()]
        if any(len(words) > 1 for words in lines):
            continue  # the lists of one class: "id 1", "id -1"
        members = splits.setdefault(Path(path).stem, [])
        members += [images.add(words[0]) for words in lines if words]
    if not splits:
        return {"train": annotated}
    return {name: np.unique(np.array(members, np.int64)) for name, members in splits.items()}
