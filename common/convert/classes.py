"""Class hierarchies in the form in which data sets ship them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.dataset_check import check_tree
from common.io.errors import UserError
from common.io.json_file import read_json


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
