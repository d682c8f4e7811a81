"""Numbers of images and categories in COCO and LVIS files, and what tables call them.

They come from a dataset directory (made from COCO or LVIS files, it keeps the numbers), from an
annotation file with `images` and `categories`, or from CSV lists of one's own.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.data.class_list import class_name
from common.data.dataset import Dataset
from common.data.photo_names import photo_name
from common.io.errors import UserError
from common.io.json_file import text_id, whole
from common.io.json_stream import stream_lists

IMAGE_IDS = ("auto", "id", "file_stem")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images that a file may speak of.

    Attributes:
      numbers: id in tables -> id in the file, mostly a number.
      sizes: id in tables -> height and width in pixels.
      source: where that was read from, for messages.
    """

    numbers: Mapping[str, int | str]
    sizes: Mapping[str, tuple[int, int]]
    source: str


@dataclasses.dataclass(frozen=True)
class Categories:
    """Category number of each label, and where that was read from."""

    numbers: Mapping[str, int | str]
    source: str


def id_texts(numbers: Mapping[str, int | str]) -> dict[str, str]:
    """What a file may call an image or a category, as text -> what tables call it.

    That is its number, as number or as text, with zeros before it or without; or, where no number
    is written so, its name in tables.
    """
    texts: dict[str, str] = {}
    for spell in (str, lambda number: str(number).lstrip("0")):
        for name, number in numbers.items():
            texts.setdefault(spell(number), name)
    for name in numbers:
        texts.setdefault(name, name)
    return texts


def find_id(texts: Mapping[str, str], value: object) -> str:
    """The name in tables of an id in a file (`id_texts`), '' = unknown.

    Raises:
      ValueError, TypeError, OverflowError: no id.
    """
    text = text_id(value)
    return texts.get(text) or texts.get(text.lstrip("0") if text.isdecimal() else text, "")


def images_of_dataset(dataset: Dataset, indices: Iterable[int]) -> Images:
    """Images of a dataset: ids that are decimal numbers, as those of COCO and LVIS, as numbers.

    Raises:
      UserError: two that are the same number.
    """
    numbers: dict[str, int | str] = {}
    owner: dict[int | str, str] = {}
    sizes = {}
    for index in indices:
        image_id = dataset.image_id(index)
        number = _plain(image_id)
        if number in owner:
            raise UserError(
                f"{dataset.directory}: image ids {owner[number]!r} and {image_id!r} are both "
                f"number {number}"
            )
        owner[number] = image_id
        numbers[image_id] = number
        height, width = dataset.image_sizes[index].tolist()
        if height and width:
            sizes[image_id] = (height, width)
    return Images(numbers, sizes, str(dataset.directory))


def categories_of_dataset(dataset: Dataset) -> Categories:
    """Category numbers that a dataset made from COCO or LVIS files keeps.

    Raises:
      UserError: it keeps none.
    """
    numbers = dataset.meta.get("category_ids")
    if not isinstance(numbers, list) or len(numbers) != dataset.num_classes:
        raise UserError(
            f"{dataset.directory}/dataset.json: no category_ids (the set was not made from COCO or "
            "LVIS files); give them by --category_ids=FILE.csv or --annotations=FILE.json"
        )
    return Categories(dict(zip(dataset.class_labels, numbers, strict=True)), str(dataset.directory))


def read_annotations(path: Path, image_id: str = "id") -> tuple[Images, Categories]:
    """Images and categories of a COCO or LVIS file (one of a test set, without annotations, too).

    Args:
      path: JSON file.
      image_id: what tables call an image: 'id' = the number as text, 'file_stem' = the file name
        without folder and extension.

    Raises:
      UserError: broken file, missing fields, something given twice.
    """
    numbers: dict[str, int | str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    categories: dict[str, int | str] = {}
    for key, value in stream_lists(path, ("categories", "images"), optional=("categories",)):
        try:
            number = _plain(text_id(value["id"]))
            if key == "categories":
                _add(categories, class_name(str(value["name"])), number, path, "category")
                continue
            name = str(number)
            if image_id == "file_stem":
                file = str(value.get("file_name") or value["coco_url"])
                name = photo_name("", file)
            _add(numbers, name, number, path, "image")
            sides = [value.get(side) for side in ("height", "width")]
            if None not in sides:
                sizes[name] = (whole(sides[0]), whole(sides[1]))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: {key}: expected objects with id and "
                f"{'name' if key == 'categories' else 'file_name'}, found "
                f"{str(value)[:80]} ({type(error).__name__}: {error})"
            ) from error
    if not numbers:
        raise UserError(f"{path}: no images in it")
    _unique(numbers, path, "images")
    _unique(categories, path, "categories")
    return Images(numbers, sizes, str(path)), Categories(categories, str(path))


def read_image_csv(path: Path) -> Images:
    """A CSV list `image_id,id` or `image_id,id,height,width`."""
    numbers: dict[str, int | str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for line, row in _rows(path, ("image_id", "id"), ("height", "width")):
        _add(numbers, row[0], _number(row[1], path, line), path, "image")
        if row[2] and row[3]:
            sizes[row[0]] = (_number(row[2], path, line), _number(row[3], path, line))
    _unique(numbers, path, "images")
    return Images(numbers, sizes, str(path))


def read_category_csv(path: Path) -> Categories:
    """A CSV list `label,id`."""
    numbers: dict[str, int | str] = {}
    for line, row in _rows(path, ("label", "id"), ()):
        _add(numbers, row[0], _number(row[1], path, line), path, "label")
    _unique(numbers, path, "labels")
    return Categories(numbers, str(path))


def image_columns(
    images: Images, image_ids: Sequence[str], needed: np.ndarray, *, pixels: bool = True
) -> tuple[list[str], np.ndarray]:
    """Ids as JSON texts (i) and sizes (i, 2) of a table's covered images.

    Args:
      images: what is known.
      image_ids: (i,) ids of the table.
      needed: (i,) bool, images without which it does not work.
      pixels: whether sizes are needed too.

    Raises:
      UserError: an image that is needed and unknown.
    """
    numbers = [""] * len(image_ids)
    sizes = np.zeros((len(image_ids), 2), np.int64)
    for i in np.flatnonzero(needed).tolist():
        image_id = image_ids[i]
        if image_id not in images.numbers:
            first = next(iter(images.numbers), "none")
            raise UserError(
                f"{images.source}: no image {image_id!r}, which the table covers (first image "
                f"there: {first!r})"
            )
        numbers[i] = json.dumps(images.numbers[image_id])
        sizes[i] = images.sizes.get(image_id, (0, 0))
        if pixels and min(sizes[i]) <= 0:
            raise UserError(
                f"{images.source}: size of image {image_id!r} is unknown, boxes in pixels need it"
            )
    return numbers, sizes


def _rows(path: Path, needed: Sequence[str], optional: Sequence[str]):
    """Line number and the named columns ('' where there are none)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if any(name not in names for name in needed):
                raise UserError(
                    f"{path}: header {','.join(names)[:80]!r}, expected {','.join(needed)}"
                )
            for row in reader:
                if any(row[name] is None for name in needed):
                    raise UserError(f"{path}: row {reader.line_num}: expected {','.join(needed)}")
                yield reader.line_num, [row.get(name) or "" for name in (*needed, *optional)]
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV file ({error})") from error


def _number(text: str, path: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{path}: row {line}: {text!r} is no whole number") from error


def _plain(text: str) -> int | str:
    """An id as files in COCO form write it: a number where it is one."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 19
    return int(text) if is_number else text


def _add(known: dict, name: str, value, path: Path, what: str) -> None:
    if name in known:
        raise UserError(f"{path}: {what} {name!r} is given twice")
    known[name] = value


def _unique(numbers: Mapping[str, int | str], path: Path, what: str) -> None:
    owner: dict[int | str, str] = {}
    for name, number in numbers.items():
        if owner.setdefault(number, name) != name:
            raise UserError(f"{path}: {what} {owner[number]!r} and {name!r} are both {number}")
