"""One Pascal VOC file, as many tools write it: any encoding, namespaces, polygons, no size."""

import dataclasses
import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

from common.convert.report import DROPPED, REPAIRED, Report
from common.data.class_list import class_name
from common.data.dataset import OCCLUDED, TRUNCATED
from common.data.photo_names import normal
from common.io.errors import UserError
from common.io.paths import check_regular

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ENCODING = re.compile(rb"""<\?xml[^>]*encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
# Encodings by the names that programs give to a part of them.
_WIDER = {
    "utf-8": "utf-8-sig",
    "utf8": "utf-8-sig",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "iso-8859-1": "cp1252",
}


@dataclasses.dataclass(frozen=True)
class VocObject:
    """One object: class name, xmin, ymin, xmax, ymax in pixels, and flags."""

    number: int
    name: str
    box: list[float]
    flags: int


@dataclasses.dataclass(frozen=True)
class VocFile:
    """What a file says.

    Attributes:
      filename: name of the photo without folder, '' = not told.
      size: height and width, (0, 0) = not told.
      database: name of the database, by which the official sets are known.
      objects: those with a name and a box.
    """

    filename: str
    size: tuple[int, int]
    database: str
    objects: list[VocObject]


def read_voc_file(path: Path, report: Report) -> VocFile | None:
    """Reads a file, None where it is another kind of XML.

    Args:
      path: of the file.
      report: gets objects without name or box.

    Raises:
      UserError: it cannot be read, is no XML, or a number is none.
    """
    root = read_xml(path)
    if root.tag != "annotation":
        return None
    objects = []
    for number, node in enumerate(root.findall("object"), 1):
        name, box = class_name(_text(node, "name")), _box(node, f"{path}, object {number}")
        if box is None and (box := _polygon_box(node)) is not None:
            report.add("box made from the polygon", REPAIRED, str(path), [number])
        if not name:
            report.add("object without name", DROPPED, str(path), [number])
        elif box is None:
            report.add("object without box", DROPPED, str(path), [number], [name])
        else:
            flags = TRUNCATED * (_text(node, "truncated") == "1")
            flags |= OCCLUDED * (_text(node, "occluded") == "1")
            objects.append(VocObject(number, name, box, flags))
    filename = os.path.basename(normal(_text(root, "filename")))
    return VocFile(filename, _size(root, path), _text(root, "source/database"), objects)


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file of any encoding, with tags without their namespaces.

    Raises:
      UserError: it cannot be read, or is no XML.
    """
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    try:
        root = ElementTree.fromstring(_decoded(path, data))
    # ValueError: a NUL; RecursionError: elements inside one another by the thousand.
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no valid XML ({error})") from error
    for node in root.iter():
        node.tag = _local(node.tag)
    return root


def _decoded(path: Path, data: bytes) -> str | bytes:
    """The text of a file by the encoding that it names; bytes where the parser knows it."""
    named = _ENCODING.search(data[:400])
    name = named[1].decode("ascii").lower() if named else "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data
    for encoding in (_WIDER.get(name, name), "utf-8-sig"):  # many files name none that there is
        try:
            return data.decode(encoding)
        except (LookupError, UnicodeDecodeError):
            continue
    raise UserError(f"{path}: found bytes that are no text of {name}; save the file as UTF-8")


def _local(tag: object) -> str:
    """A tag without its namespace."""
    return tag.rsplit("}", 1)[-1] if isinstance(tag, str) else ""


def _text(node: ElementTree.Element, tag: str) -> str:
    return (node.findtext(tag) or "").strip()


def _size(root: ElementTree.Element, path: Path) -> tuple[int, int]:
    sides = []
    for tag in ("size/height", "size/width"):
        text = _text(root, tag)
        try:
            side = float(text) if text else 0.0
        except ValueError:
            side = math.nan
        if not 0 <= side < 1 << 31:
            raise UserError(f"{path}: <{tag}> says {text[:40]!r}, expected pixels")
        sides.append(int(side))
    return (sides[0], sides[1]) if all(sides) else (0, 0)


def _box(node: ElementTree.Element, where: str) -> list[float] | None:
    texts = [_text(node, f"bndbox/{corner}") for corner in _CORNERS]
    if not any(texts):
        return None
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"{where}: <bndbox> needs numbers {', '.join(_CORNERS)} ({error})"
        ) from error


def _polygon_box(node: ElementTree.Element) -> list[float] | None:
    """Box around a polygon of three or more points: <x1>, <y1>, ... or <pt><x>, <y>."""
    polygon = node.find("polygon")
    if polygon is None:
        return None
    numbers: dict[str, list[float]] = {"x": [], "y": []}
    for child in polygon.iter():
        axis = str(child.tag)[:1]
        if re.fullmatch(r"[xy]\d*", str(child.tag)):
            try:
                numbers[axis].append(float(child.text or ""))
            except ValueError:
                return None
    x, y = numbers["x"], numbers["y"]
    if len(x) < 3 or len(x) != len(y) or not all(map(math.isfinite, x + y)):
        return None
    return [min(x), min(y), max(x), max(y)]
