"""YOLO folders: `data.yaml`, photos in `images/`, a text file of the same name in `labels/`.

A line is `class x y width height` (centre and size, shares of the photo) or, of sets for
segmentation, `class x1 y1 x2 y2 x3 y3 ...`, a polygon. Splits are the folders, lists (.txt) or both
that `train`, `val` and `test` name; a photo without text file has no objects. Ids are the photos'
names without extension, or their paths where two have one name.
"""

import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from common.convert.annotations import (
    BOX_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    Annotations,
    Columns,
    ImageTable,
)
from common.convert.classes import read_class_list, read_hierarchy
from common.convert.cleaning import check_layout
from common.convert.photo_names import normal, split_extension
from common.convert.photos import read_sizes, walk
from common.convert.report import NOTED, Report
from common.io.errors import UserError
from common.io.progress import Progress

_SPLITS = ("train", "val", "valid", "validation", "test")


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
      source: its .yaml file, or the folder that holds one.
      report: gets photos without text file.
      spool_folder: for temporary files.
      classes: class list instead of the names in the file.
      hierarchy: optional hierarchy of the class names.

    Raises:
      UserError: a file is missing or broken, or a line is no object.
    """
    config = _find_config(source)
    content = _read_config(config)
    numbers, names = _class_names(config, content)
    if classes is not None:
        names = read_class_list(classes)[1]
        numbers = list(range(len(names)))
    photos = _photos(config, content)
    everything = [path for paths in photos.values() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in everything]))
    relative = [path.relative_to(root).as_posix() for path in everything]
    sizes, _ = read_sizes(root, relative)
    stems = Counter(split_extension(os.path.basename(path))[0] for path in set(relative))
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
                stem = split_extension(relative[done])[0]
                name = os.path.basename(stem)
                is_new = images.find(name if stems[name] == 1 else stem) < 0
                index = images.add(name if stems[name] == 1 else stem)
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


def _find_config(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"--source={source}: no such file or folder")
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = [path for path in found if path.stem in ("data", "dataset")] or found
    if len(named) != 1:
        raise UserError(
            f"--source={source}: found {len(named)} .yaml files, expected one, such as data.yaml "
            "with train, val and names"
        )
    return named[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    # ValueError: not UTF-8, impossible dates; RecursionError: lists in lists by the thousand.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected fields train, val and names")
    return content


def _class_names(path: Path, content: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Numbers and names of the classes, by number."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    names = names if isinstance(names, dict) else {}
    good = (
        bool(names)
        and all(type(number) is int and 0 <= number < 1 << 31 for number in names)
        and all(isinstance(name, str | int | float) for name in names.values())
    )
    if not good:
        raise UserError(f"{path}: field names: expected a list of class names or number: name")
    numbers = sorted(names)
    return numbers, [str(names[number]) for number in numbers]


def _photos(config: Path, content: dict[str, Any]) -> dict[str, list[Path]]:
    """Absolute paths of the photos of each split."""
    base = config.parent.absolute()
    root = content.get("path") or ""
    bases = [base / root, base] if isinstance(root, str) else [base]
    photos: dict[str, list[Path]] = {}
    for split in _SPLITS:
        places = content.get(split)
        if not places:
            continue
        places = places if isinstance(places, list) else [places]
        if not all(isinstance(place, str) and "\0" not in place for place in places):
            raise UserError(f"{config}: field {split}: expected a path or a list of paths")
        found = [path for place in places for path in _photos_at(config, split, place, bases)]
        if found:
            photos[split] = list(dict.fromkeys(found))
    if not photos:
        raise UserError(
            f"{config}: no photo where {', '.join(_SPLITS)} point (of path {root!r} and {base})"
        )
    return photos


def _photos_at(config: Path, split: str, place: str, bases: list[Path]) -> list[Path]:
    place = normal(place)
    # Exports of Roboflow write ../train/images for what lies beside the file.
    for path in [base / text for text in (place, place.removeprefix("../")) for base in bases]:
        path = Path(os.path.normpath(path))
        if path.is_dir():
            return [path / name for name in walk(path) if split_extension(name)[1]]
        if path.is_file() and path.suffix == ".txt":
            lines = [normal(line.strip()) for line in _read_text(path).splitlines()]
            listed = [Path(os.path.normpath(path.parent / line)) for line in lines if line]
            missing = [photo for photo in listed if not photo.is_file()]
            if missing:
                raise UserError(f"{path}: no photo {missing[0]} ({len(missing)} of {len(listed)})")
            return listed
    print(f"{config}: {split}: {place} is not there, it is left out", flush=True)
    return []


def _label_file(photo: Path) -> Path | None:
    """The text file of a photo: in `labels` for `images`, or beside it."""
    stem = split_extension(str(photo))[0]
    head, marker, tail = stem.rpartition("/images/")
    candidates = [f"{head}/labels/{tail}.txt"] if marker else []
    for name in (*candidates, f"{stem}.txt"):
        if os.path.isfile(name):
            return Path(name)
    return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def _read_lines(path: Path) -> list[tuple[int, int, list[float]]]:
    """Line number, class number and coordinates of each object."""
    rows = []
    for line, text in enumerate(_read_text(path).splitlines(), 1):
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
