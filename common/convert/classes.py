"""Class lists and hierarchies in the forms in which data sets ship them."""

import csv
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.dataset_check import check_tree
from common.io.errors import UserError
from common.io.json_file import read_json

_HEADERS = ("labelname", "label", "mid", "class", "name", "displayname")


def class_name(text: str) -> str:
    """A class as its files may spell it: composed letters, single spaces, none around it."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def read_class_list(path: Path) -> tuple[list[str], list[str]]:
    """Reads a class list: `label,name` rows or one label a line, header optional.

    Returns:
      Labels and names in the order of the file.

    Raises:
      UserError: not UTF-8, empty, or a label given twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the class list ({error.strerror})") from error
    if rows and rows[0][0].strip().lower() in _HEADERS and len(rows) > 1:
        header = [cell.strip().lower() for cell in rows[0]]
        if len(header) < 2 or header[1] in _HEADERS:
            rows = rows[1:]
    if not rows:
        raise UserError(f"{path}: the class list is empty; expected rows label,name")
    labels = [class_name(row[0]) for row in rows]
    names = [class_name(row[1] if len(row) > 1 else row[0]) for row in rows]
    first: dict[str, int] = {}
    for i, label in enumerate(labels):
        if label in first:
            raise UserError(
                f"{path}: label {label!r} is given by class {first[label] + 1} and {i + 1}"
            )
        first[label] = i
    return labels, names


def read_hierarchy(path: Path | None, class_labels: Sequence[str]) -> dict[str, Any] | None:
    """Reads a hierarchy and hangs classes that it does not mention below the root; None = flat.

    Raises:
      UserError: no JSON, nodes without LabelName, or a tree of other classes.
    """
    if path is None:
        return None
    try:
        tree = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the hierarchy ({error.strerror})") from error
    mentioned = check_tree(path, tree)
    missing = [label for label in class_labels if label not in mentioned]
    if len(missing) == len(class_labels):
        raise UserError(
            f"{path}: none of the classes is in this hierarchy (first class {class_labels[0]!r}, "
            f"first node {next(iter(sorted(mentioned)), None)!r})"
        )
    if missing:
        print(f"{path}: {len(missing)} classes are not in it, they hang below the root", flush=True)
        added = [{"LabelName": label} for label in missing]
        tree = tree | {"Subcategory": tree.get("Subcategory", []) + added}
    return tree
