"""Checks of an opened dataset directory, which somebody may have edited or a disk damaged.

Of long arrays the beginning and the end are looked at: opening stays a matter of milliseconds.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset_format import FORMAT, INDEX, OPTIONAL, STRINGS
from common.io.errors import UserError
from common.io.paths import PathLike

_LOOK = 1 << 18  # elements at each end
_COUNTS = ("num_images", "num_boxes", "num_labels", "num_classes")
_TEXTS = ("name", "image_root")
_LISTS = ("category_ids", "frequency")  # one entry a class, where they are there
_AGAIN = "prepare the data again"


def check_meta(path: Path, meta: Any) -> dict[str, Any]:
    """The content of dataset.json with all fields that the code relies on.

    Raises:
      UserError: another format, or a field that is missing or of another type.
    """
    if not isinstance(meta, dict):
        raise UserError(f"{path}: found {type(meta).__name__}, expected an object {{...}}")
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path}: field format is {meta.get('format')!r:.40}, this code reads "
            f"{FORMAT}: {_AGAIN}"
        )
    for name in _COUNTS:
        value = meta.get(name)
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise UserError(f"{path}: field {name} is {value!r:.40}, expected a number: {_AGAIN}")
    for name in _TEXTS:
        if not isinstance(meta.get(name), str) or "\0" in meta[name]:
            raise UserError(f"{path}: field {name} is {meta.get(name)!r:.40}, expected text")
    for name in set(OPTIONAL.values()):
        if not isinstance(meta.get(name, False), bool):
            raise UserError(f"{path}: field {name} is {meta[name]!r:.40}, expected true or false")
    for name in _LISTS:
        value = meta.get(name)
        if value is not None and (not isinstance(value, list) or len(value) != meta["num_classes"]):
            raise UserError(f"{path}: field {name}: expected a list of one entry a class: {_AGAIN}")
    if not isinstance(meta.get("mask_root") or "", str):
        raise UserError(f"{path}: field mask_root is {meta['mask_root']!r:.40}, expected text")
    return meta


def check_tree(path: PathLike, tree: Any) -> set[str]:
    """The labels below the root of a hierarchy.

    Raises:
      UserError: a node that is none.
    """
    labels: set[str] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str):
            raise UserError(
                f'{path}: a node without "LabelName"; expected nested '
                '{"LabelName": ..., "Subcategory": [...]}'
            )
        children = node.get("Subcategory", [])
        if not isinstance(children, list):
            raise UserError(f"{path}: Subcategory of {node['LabelName']:.80} is no list")
        names = (child.get("LabelName") for child in children if isinstance(child, dict))
        labels |= {name for name in names if isinstance(name, str)}
        pending += children
    return labels


def check_index(directory: Path, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Checks types, lengths and references of the index arrays (None = the set has none).

    Raises:
      UserError: names the file and what is wrong with it.
    """
    masks, offsets = directory / "masks.bin", arrays["mask_offsets"]
    if offsets is not None:
        size = masks.stat().st_size if masks.is_file() else -1
        if _is_column(offsets) and len(offsets) and int(offsets[-1]) != size:
            found = f"{size} bytes" if size >= 0 else "missing"
            raise UserError(f"{masks}: {found}, expected {offsets[-1]} bytes: {_AGAIN}")
    for name, problem in _problems(meta, arrays):
        raise UserError(f"{directory}/index/{name}.npy: {problem}: {_AGAIN}")


def _problems(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    images, classes = meta["num_images"], meta["num_classes"]
    ignored = arrays["ignore_offsets"]
    rows = {
        "images": images,
        "images + 1": images + 1,
        "boxes": meta["num_boxes"],
        "boxes + 1": meta["num_boxes"] + 1,
        "labels": meta["num_labels"],
        "ignore boxes": int(ignored[-1]) if _is_column(ignored) and len(ignored) else 0,
    }
    for name, array in arrays.items():
        if array is None:
            continue
        dtype, columns, of = INDEX.get(name, ("int32", None, "images"))
        if name in STRINGS:
            if array.ndim != 1 or array.dtype.kind != "S":
                yield name, f"found {array.dtype}, expected byte strings"
        elif array.dtype != dtype or array.shape[1:] != (() if columns is None else (columns,)):
            yield name, f"found {array.dtype} of shape {array.shape}, expected {dtype}"
        if len(array) != rows[of]:
            yield name, f"{len(array)} rows, dataset.json says {rows[of]}"
    for name, owner in (
        ("box_offsets", "boxes"),
        ("label_offsets", "labels"),
        ("ignore_offsets", "ignore boxes"),
        ("mask_offsets", None),
    ):
        offsets = arrays[name]
        if offsets is None:
            continue
        if any((part[1:] < part[:-1]).any() for part in _ends(offsets)) or offsets[0] != 0:
            yield name, "offsets that fall, expected 0 and then no less than the one before"
        if owner and int(offsets[-1]) != rows[owner]:
            yield name, f"ends with {offsets[-1]}, dataset.json says {rows[owner]} {owner}"
    for name, limit in (
        ("box_class", classes),
        ("label_class", classes),
        ("image_id_order", images),
    ):
        for part in _ends(arrays[name]):
            if len(part) and not 0 <= part.min() <= part.max() < limit:
                yield name, f"found {part.min()} to {part.max()}, expected 0 to {limit - 1}"
    for name in STRINGS:
        for part in _ends(arrays[name]):
            try:
                np.ascontiguousarray(part).tobytes().decode()
            except UnicodeDecodeError:
                yield name, "found bytes that are not UTF-8"
    for part in _ends(arrays["image_size"]):
        if len(part) and part.min() < 0:
            yield "image_size", f"found a side of {part.min()}, expected pixels"


def _is_column(array: Any) -> bool:
    return array is not None and array.ndim == 1 and array.dtype.kind in "iu"


def _ends(array: np.ndarray) -> tuple[np.ndarray, ...]:
    if len(array) <= 2 * _LOOK:
        return (array,)
    return array[:_LOOK], array[-_LOOK:]


def check_split(path: Path, members: np.ndarray, num_images: int) -> np.ndarray:
    """The indices of a split.

    Raises:
      UserError: they are no indices of images of the set.
    """
    good = members.ndim == 1 and members.dtype == np.int64
    if not good or (len(members) and not 0 <= members.min() <= members.max() < num_images):
        raise UserError(
            f"{path}: found {members.dtype} of shape {members.shape}, expected indices of the "
            f"{num_images:,} images: {_AGAIN}"
        )
    return members
