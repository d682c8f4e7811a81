"""Cuts the aerial photos of the `deepforest` wheel into a small Pascal VOC data set of trees.

    python -m scripts.quickstart_data --wheel=deepforest-2.1.0-py3-none-any.whl --output=trees_voc

The wheel (MIT licence) is read as a zip file and never installed or imported. Its four photos with
Pascal VOC boxes have 951 trees: class Tree, and on one photo Alive and Dead, which makes a small
hierarchy. The lower quarter of every photo is validation, the rest training, and both are cut into
tiles that do not overlap: no pixel is in both splits. A tree on a cut stays in the tiles that show
enough of it.

Writes JPEGImages/, Annotations/, ImageSets/Main/{train,validation}.txt, classes.csv and
hierarchy.json.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from absl import flags
from PIL import Image

from common.io.atomic import atomic_folder
from common.io.commands import run_main
from common.io.errors import UserError

CLASSES = ("Tree", "Alive", "Dead")
HIERARCHY = {
    "LabelName": "Entity",
    "Subcategory": [
        {"LabelName": "Tree", "Subcategory": [{"LabelName": "Alive"}, {"LabelName": "Dead"}]}
    ],
}
PHOTO_SUFFIXES = (".png", ".jpg", ".JPG", ".jpeg", ".tif")  # in order of preference
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MIN_SIDE = 2.0  # pixels; a thinner rest of a cut box is no tree

Window = tuple[int, int, int, int]  # xmin, ymin, xmax, ymax in pixels, half-open


@dataclasses.dataclass(frozen=True)
class Box:
    """One object: pixels of its photo, continuous and half-open."""

    name: str
    xmin: float
    ymin: float
    xmax: float
    ymax: float
    truncated: bool = False

    @property
    def area(self) -> float:
        return max(self.xmax - self.xmin, 0.0) * max(self.ymax - self.ymin, 0.0)


def read_voc(text: bytes, source: str) -> list[Box]:
    """Objects of a Pascal VOC file; corners are taken as edges (not as 1-based pixel numbers).

    Raises:
      UserError: no XML, or an object without a class of ours or without four corners.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{source}: no valid XML ({error})") from error
    boxes = []
    for row, item in enumerate(root.iter("object"), 1):
        name = item.findtext("name")
        if name not in CLASSES:
            raise UserError(
                f"{source}: object {row} is a {name!r}, expected one of {', '.join(CLASSES)}"
            )
        try:
            xmin, ymin, xmax, ymax = (float(item.findtext(f"bndbox/{key}", "")) for key in CORNERS)
        except ValueError as error:
            raise UserError(f"{source}: object {row} has no bndbox with four corners") from error
        boxes.append(Box(name, xmin, ymin, xmax, ymax))
    return boxes


def cuts(start: int, stop: int, longest: int) -> list[int]:
    """Borders of the fewest equal parts (up to a pixel) of [start, stop) that are short enough."""
    parts = -(-(stop - start) // longest)
    return [start + (stop - start) * i // parts for i in range(parts + 1)]


def tiles(width: int, height: int, longest: int, validation: float) -> Iterator[tuple[str, Window]]:
    """(split, window) of every tile; together they cover the photo once."""
    border = height - round(height * validation)
    for split, top, bottom in (("train", 0, border), ("validation", border, height)):
        xs, ys = cuts(0, width, longest), cuts(top, bottom, longest)
        for ymin, ymax in zip(ys[:-1], ys[1:], strict=True):
            for xmin, xmax in zip(xs[:-1], xs[1:], strict=True):
                yield split, (xmin, ymin, xmax, ymax)


def cut_boxes(boxes: list[Box], window: Window, min_visible: float) -> list[Box]:
    """Boxes of a tile in its own pixels, clipped, without those of which it shows too little."""
    kept = []
    for box in boxes:
        cut = Box(
            box.name,
            max(box.xmin, window[0]) - window[0],
            max(box.ymin, window[1]) - window[1],
            min(box.xmax, window[2]) - window[0],
            min(box.ymax, window[3]) - window[1],
        )
        if min(cut.xmax - cut.xmin, cut.ymax - cut.ymin) < MIN_SIDE:
            continue
        if cut.area >= min_visible * box.area:
            kept.append(dataclasses.replace(cut, truncated=cut.area < box.area))
    return kept


def write_voc(path: Path, photo: str, size: tuple[int, int], boxes: list[Box]) -> None:
    """Writes a Pascal VOC file; `size` is width, height."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = photo
    frame = ElementTree.SubElement(root, "size")
    for key, value in zip(("width", "height", "depth"), (*size, 3), strict=True):
        ElementTree.SubElement(frame, key).text = str(value)
    for box in boxes:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = box.name
        ElementTree.SubElement(item, "truncated").text = str(int(box.truncated))
        ElementTree.SubElement(item, "difficult").text = "0"
        corners = ElementTree.SubElement(item, "bndbox")
        for key in CORNERS:
            ElementTree.SubElement(corners, key).text = f"{getattr(box, key):g}"
    ElementTree.indent(root)
    path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


def annotated_photos(wheel: zipfile.ZipFile) -> Iterator[tuple[str, Image.Image, list[Box]]]:
    """(name, photo, boxes) of every photo in the wheel that has a Pascal VOC file beside it.

    Raises:
      UserError: no such photo, or a VOC file without its photo.
    """
    names = set(wheel.namelist())
    annotations = sorted(n for n in names if n.endswith(".xml") and "/data/" in n)
    if not annotations:
        raise UserError(f"{wheel.filename}: found no */data/*.xml, expected the deepforest wheel")
    for annotation in annotations:
        stem = annotation.removesuffix(".xml")
        photo = next((stem + s for s in PHOTO_SUFFIXES if stem + s in names), None)
        if photo is None:
            raise UserError(f"{wheel.filename}: {annotation} has no photo beside it")
        image = Image.open(io.BytesIO(wheel.read(photo))).convert("RGB")
        yield Path(stem).name, image, read_voc(wheel.read(annotation), annotation)


def build(
    wheel_path: Path, output: Path, tile_size: int, validation: float, min_visible: float
) -> None:
    """Writes the VOC folder, which appears under its name only when complete.

    Raises:
      UserError: the wheel is missing, broken or another package's.
    """
    try:
        wheel = zipfile.ZipFile(wheel_path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel_path}: cannot be read as a wheel ({error})") from error
    if output.exists() and not (output / "ImageSets").is_dir():
        raise UserError(f"{output}: exists and is no VOC folder, expected a new name")
    with wheel, atomic_folder(output) as folder:
        _write_folder(wheel, Path(folder), tile_size, validation, min_visible)


def _write_folder(
    wheel: zipfile.ZipFile, folder: Path, tile_size: int, validation: float, min_visible: float
) -> None:
    for inside in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / inside).mkdir(parents=True)
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    boxes_of = dict.fromkeys(splits, 0)
    for name, photo, boxes in annotated_photos(wheel):
        for split, window in tiles(*photo.size, tile_size, validation):
            tile = f"{name}_{window[0]:04d}_{window[1]:04d}"
            kept = cut_boxes(boxes, window, min_visible)
            crop = photo.crop(window)
            crop.save(folder / "JPEGImages" / f"{tile}.jpg", quality=95)
            write_voc(folder / "Annotations" / f"{tile}.xml", f"{tile}.jpg", crop.size, kept)
            splits[split].append(tile)
            boxes_of[split] += len(kept)
        print(f"{name}: {photo.width} x {photo.height} pixels, {len(boxes)} boxes", flush=True)
    for split, names in splits.items():
        lines = "".join(f"{name}\n" for name in names)
        (folder / "ImageSets/Main" / f"{split}.txt").write_text(lines, encoding="utf-8")
        print(f"{split}: {len(names)} tiles, {boxes_of[split]} boxes", flush=True)
    rows = "".join(f"{name},{name}\n" for name in CLASSES)
    (folder / "classes.csv").write_text("label,name\n" + rows, encoding="utf-8")
    (folder / "hierarchy.json").write_text(json.dumps(HIERARCHY, indent=1), encoding="utf-8")


def define_flags() -> None:
    flags.DEFINE_string("wheel", None, "Wheel of the deepforest package.", required=True)
    flags.DEFINE_string(
        "output", None, "Folder to write; an existing one is replaced.", required=True
    )
    flags.DEFINE_integer("tile_size", 400, "Longest side of a tile, pixels.", lower_bound=64)
    flags.DEFINE_float(
        "validation_share", 0.25, "Lower part of each photo that is validation.", 0.05, 0.95
    )
    flags.DEFINE_float(
        "min_visible", 0.4, "A cut tree stays in a tile that shows this share of its box.", 0.0, 1.0
    )


def main():
    values = flags.FLAGS
    build(
        Path(values.wheel),
        Path(values.output),
        values.tile_size,
        values.validation_share,
        values.min_visible,
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
