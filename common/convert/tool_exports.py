"""Exports in forms of the annotation tools' own: CVAT's XML "for images", Label Studio's JSON.

Boxes and polygons are read (rotated boxes as the boxes around them); points, lines, tags and brush
strokes are counted and left out. The classes are those of the project where the export lists them,
else those that occur, sorted.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
from common.convert.report import DROPPED, NOTED, Report
from common.convert.voc_file import read_xml
from common.data.class_list import class_name
from common.data.photo_names import normal, photo_name, readings, split_extension
from common.io.errors import UserError
from common.io.json_stream import stream_list


@dataclasses.dataclass(frozen=True)
class Shape:
    """A box or polygon: class, corners in pixels, and whether they are of a polygon."""

    label: str
    points: list[tuple[float, float]]
    is_polygon: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """A photo, its height and width, and what is drawn on it."""

    file: str
    size: tuple[int, int]
    shapes: list[Shape]


def read_cvat(source: Path, report: Report, spool: Path, hierarchy: Path | None) -> Annotations:
    """Reads one file of CVAT's "CVAT for images 1.1", or the folder that holds annotations.xml.

    Raises:
      UserError: no such file, or a broken one; names the place.
    """
    path = source / "annotations.xml" if source.is_dir() else source
    root = read_xml(path)
    labels = [
        text for node in root.iter("label") if (text := class_name(node.findtext("name") or ""))
    ]
    tasks = (_cvat_task(path, node, report) for node in root.iter("image"))
    return _annotations("cvat", path, tasks, labels, spool, hierarchy, report)


def read_label_studio(
    source: Path, report: Report, spool: Path, hierarchy: Path | None
) -> Annotations:
    """Reads Label Studio's JSON export; of several annotations of a task the first counts.

    Raises:
      UserError: no such file, or a broken one; names the task.
    """
    tasks = (
        _studio_task(source, number, task, report)
        for number, task in enumerate(stream_list(source), 1)
    )
    return _annotations("label_studio", source, tasks, [], spool, hierarchy, report)


def _cvat_task(path: Path, node: ElementTree.Element, report: Report) -> Task:
    name = node.get("name") or ""
    where = f"{path}: image {name!r:.80}"
    try:
        size = (int(node.get("height") or 0), int(node.get("width") or 0))
        shapes = []
        for child in node:
            label = class_name(child.get("label") or "")
            if not label or child.tag not in ("box", "polygon"):
                reason = "object that is no box or polygon" if label else "object without name"
                report.add(reason, DROPPED, str(path), [name], [child.tag])
            elif child.tag == "box":
                x0, y0, x1, y1 = (
                    float(child.get(key) or "") for key in ("xtl", "ytl", "xbr", "ybr")
                )
                turn = float(child.get("rotation") or 0)
                shapes.append(Shape(label, _turned(x0, y0, x1, y1, turn, centre=True), False))
            else:
                pairs = [pair.split(",") for pair in (child.get("points") or "").split(";")]
                shapes.append(Shape(label, [(float(x), float(y)) for x, y in pairs], True))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: found no numbers where they belong ({error})") from error
    return _checked(where, Task(name, size, shapes))


def _studio_task(path: Path, number: int, task: Any, report: Report) -> Task:
    where = f"{path}: task {number}"
    try:
        texts = [value for value in task["data"].values() if isinstance(value, str)]
        file = task["data"].get("image") or texts[0]
        results = [a["result"] for a in task["annotations"] if not a.get("was_cancelled")]
        report.add("further annotation of a task", NOTED, str(path), [number] * (len(results) - 1))
        size, shapes = (0, 0), []
        for result in results[0] if results else ():
            value, kind = result["value"], result.get("type")
            labels = (
                value.get(kind) if kind in ("rectanglelabels", "polygonlabels") else None
            ) or []
            label = class_name(str(labels[0])) if labels else ""
            if not label:
                reason = "object that is no box or polygon" if kind else "object without name"
                report.add(reason, DROPPED, str(path), [number], [str(kind)[:40]])
                continue
            height, width = int(result["original_height"]), int(result["original_width"])
            size, scale = (height, width), (width / 100, height / 100)
            if kind == "polygonlabels":
                points = [(float(x) * scale[0], float(y) * scale[1]) for x, y in value["points"]]
            else:
                x, y = float(value["x"]) * scale[0], float(value["y"]) * scale[1]
                right = x + float(value["width"]) * scale[0]
                bottom = y + float(value["height"]) * scale[1]
                turn = float(value.get("rotation") or 0)
                points = _turned(x, y, right, bottom, turn, centre=False)
            report.add("further class of an object", NOTED, str(path), [number] * (len(labels) - 1))
            shapes.append(Shape(label, points, kind == "polygonlabels"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{where}: found another form ({type(error).__name__}: {str(error)[:80]}), expected "
            "Label Studio's JSON: data, annotations, result, value"
        ) from error
    return _checked(where, Task(_local_name(str(file)), size, shapes))


def _checked(where: str, task: Task) -> Task:
    if not 0 <= min(task.size) <= max(task.size) < 1 << 31:
        raise UserError(f"{where}: found a photo of {task.size[1]}x{task.size[0]} pixels")
    if not task.file.strip() or not task.file.isprintable():
        raise UserError(f"{where}: found a photo without name")
    if not all(shape.points for shape in task.shapes):
        raise UserError(f"{where}: found an outline without points")
    return task


def _local_name(file: str) -> str:
    """Path of an uploaded photo: Label Studio serves it below an address of its own."""
    path = readings(file)[-1]
    return path.rsplit("/", 1)[-1] if "/data/upload/" in f"/{path}" else path


def _turned(
    x0: float, y0: float, x1: float, y1: float, degrees: float, *, centre: bool
) -> list[tuple[float, float]]:
    """Corners of a box turned around its centre (CVAT) or its top left corner (Label Studio)."""
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if not degrees:
        return corners
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    px, py = ((x0 + x1) / 2, (y0 + y1) / 2) if centre else (x0, y0)
    return [
        (px + (x - px) * cos - (y - py) * sin, py + (x - px) * sin + (y - py) * cos)
        for x, y in corners
    ]


def _annotations(
    name: str,
    path: Path,
    tasks: Iterator[Task],
    labels: list[str],
    spool_folder: Path,
    hierarchy: Path | None,
    report: Report,
) -> Annotations:
    images, found = ImageTable(), list(tasks)
    if not found:
        raise UserError(f"{path}: found no image, expected an export of {name}")
    labels = list(dict.fromkeys(labels)) or sorted({s.label for t in found for s in t.shapes})
    if not labels:
        raise UserError(f"{path}: found no object with a class")
    order = {label: i for i, label in enumerate(labels)}
    stems = [split_extension(normal(task.file))[0] for task in found]
    short = [photo_name("", task.file) for task in found]
    unique = len(set(short)) == len(set(stems))
    columns, has_masks = Columns(BOX_COLUMNS | MASK_COLUMNS), False
    spool = spool_folder / "masks.spool"
    with open(spool, "wb") as masks:
        for task, stem, name_ in zip(found, stems, short, strict=True):
            image_id = name_ if unique else stem
            if images.find(image_id) >= 0:
                report.add("photo given twice, objects of both", NOTED, str(path), [image_id])
            index = images.add(image_id)
            images.files[index], images.sizes[index] = task.file, task.size
            height, width = task.size if all(task.size) else (1, 1)
            for number, shape in enumerate(task.shapes, 1):
                points = np.array(shape.points, np.float64)
                corners = np.concatenate([points.min(0), points.max(0)])
                is_mask = shape.is_polygon and len(points) >= 3 and bool(np.isfinite(points).all())
                mask = (
                    json.dumps([points.round(3).reshape(-1).tolist()]).encode() if is_mask else b""
                )
                has_masks |= is_mask
                columns.append(
                    **{"class": [order.get(shape.label, -1)]},
                    image=[index],
                    box=(corners / (width, height, width, height))[None],
                    flags=[0],
                    file=[0],
                    row=[number],
                    mask_start=[masks.tell()],
                    mask_length=[len(mask)],
                    mask_check=[zlib.crc32(mask)],
                )
                masks.write(mask)
    boxes = columns.take()
    if not has_masks:
        for column in MASK_COLUMNS:
            del boxes[column]
    return Annotations(
        name=name,
        source=str(path),
        class_labels=labels,
        class_names=labels,
        hierarchy=read_hierarchy(hierarchy, labels),
        images=images,
        splits={"train": np.arange(len(images))},
        boxes=boxes,
        labels=Columns(LABEL_COLUMNS).take(),
        files=[str(path)],
        search=path.parent,
        mask_spool=spool if has_masks else None,
        unsized={i for i, size in images.sizes.items() if not all(size)},
        extra={"exhaustive": True, "image_id": "file_stem"},
    )
