"""Class lists as users and data sets write them: CSV files of labels, and names beside them."""

import csv
import unicodedata
from typing import NamedTuple

from common.io.errors import UserError
from common.io.paths import PathLike, local_copy

_HEADERS = ("labelname", "label", "mid", "class", "name", "displayname")


class ClassList(NamedTuple):
    """Classes in the order of their file.

    Attributes:
      labels: unique, at least one.
      names: to show; the label, where a row has no second column.
      lines: where each stands in the file, from 1.
    """

    labels: list[str]
    names: list[str]
    lines: list[int]


def class_name(text: str) -> str:
    """A class as its files may spell it: composed letters, single spaces, none around it."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def read_class_list(path: PathLike) -> ClassList:
    """Reads a class list, local or gs://: `label,name` rows or one label a line, header optional.

    Raises:
      UserError: it cannot be read, is not UTF-8, is empty, or a label is given twice.
    """
    try:
        with local_copy(path) as local, open(local, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV file ({error})") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot read the class list ({reason})") from error
    if len(rows) > 1 and _is_header(rows[0][1]):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path}: the class list is empty; expected rows label,name")
    listed = ClassList([], [], [])
    first: dict[str, int] = {}
    for line, row in rows:
        label = class_name(row[0])
        if label in first:
            raise UserError(f"{path}: label {label!r} is given in lines {first[label]} and {line}")
        first[label] = line
        listed.labels.append(label)
        listed.names.append(class_name(row[1] if len(row) > 1 else row[0]))
        listed.lines.append(line)
    return listed


def _is_header(row: list[str]) -> bool:
    return all(cell.strip().lower() in _HEADERS for cell in row[:2])
