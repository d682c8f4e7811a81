"""Long-tailed sets in LVIS form out of COCO files: classes thinned to rare, common and frequent.

COCO has many photos of each class, LVIS of most classes few. Here the classes, in the order of how
many training photos show them, are dealt in turn to frequent (all their photos stay), common and
rare, so that all three groups have easy and hard classes, and enough objects in the validation
files, which keep theirs. A thinned class keeps its objects on some photos, all of them there; those
on its other photos are taken out, and belong into an ignore file, since they are no background.

Crowds, which LVIS does not have, leave their class not exhaustively labelled on the photo.

Shape legend: K categories in the order of the file.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.convert.coco import split_name
from common.convert.coco_file import CocoFile
from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.json_stream import stream_lists

_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "segmentation")
_IMAGE_FIELDS = ("id", "file_name", "height", "width")
GROUPS = ("f", "c", "r")  # in the order in which classes are dealt


class Thinned(NamedTuple):
    """What thinning leaves of a training file.

    Attributes:
      kept: category -> ids of the photos on which it stays labelled.
      frequency: category -> 'f', 'c' or 'r', by the number of those.
    """

    kept: dict[int, frozenset[Any]]
    frequency: dict[int, str]


def thin_classes(
    photos: Mapping[int, Iterable[Any]], limits: tuple[int, int], seed: int
) -> Thinned:
    """Which photos of each class stay: a pure function of the ids, the limits and the seed.

    Args:
      photos: category -> ids of the photos that show it.
      limits: most photos of a rare and of a common class. Targets below them are drawn evenly,
        from 1 for rare classes, and from one above the rare limit for common ones.
      seed: another one deals out other photos.
    """
    rare, common = limits
    kept, frequency = {}, {}
    ranked = sorted(photos, key=lambda c: (-len(set(photos[c])), c))
    for rank, category in enumerate(ranked):
        order = sorted(set(photos[category]), key=lambda i: _hash(seed, category, i))
        low, high = {"f": (len(order),) * 2, "c": (rare + 1, common), "r": (1, rare)}[
            GROUPS[rank % len(GROUPS)]
        ]
        number = low + _hash(seed, category) % (high - low + 1)
        kept[category] = frozenset(order[:number])
        count = len(kept[category])
        frequency[category] = "r" if count <= rare else "c" if count <= common else "f"
    return Thinned(kept, frequency)


def _hash(*parts: Any) -> int:
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def write_long_tail(
    train: Path, validation: list[Path], output: Path, limits: tuple[int, int], seed: int
) -> Thinned:
    """Writes lvis_SPLIT.json of each file into `output`, and ignore.json.

    Raises:
      UserError: a file that cannot be read, one without masks, or two of one split.
    """
    files = [train, *validation]
    splits = [split_name(path) for path in files]
    if len(set(splits)) < len(splits):
        raise UserError(f"{files[-1]}: found splits {', '.join(splits)}, expected different names")
    present = _present(train)
    if not present:
        raise UserError(f"{train}: no object has a mask, expected some")
    thinned = thin_classes(present, limits, seed)
    counts = {category: len(ids) for category, ids in thinned.kept.items()}
    for path, split in zip(files, splits, strict=True):
        kept = thinned.kept if path is train else None
        content, taken = _lvis_content(path, thinned.frequency, kept)
        for category in content["categories"]:
            category["image_count"] = counts[category["id"]]
        _write(output / f"lvis_{split}.json", content)
        if path is train:
            _write(output / "ignore.json", {**content, "annotations": taken})
    return thinned


def _present(path: Path) -> dict[int, set[Any]]:
    """Photos with a mask of each category; crowds do not count."""
    found: dict[int, set[Any]] = defaultdict(set)
    for _, row in stream_lists(path, ("annotations",)):
        if row.get("segmentation") and not row.get("iscrowd"):
            found[row["category_id"]].add(row["image_id"])
    return found


def _lvis_content(
    path: Path, frequency: Mapping[int, str], kept: Mapping[int, frozenset[Any]] | None
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """A COCO file in LVIS form, and the objects that do not stay in it, crowds among them."""
    CocoFile(path)  # refuses what is no COCO file, by row and field
    categories = [
        {"id": row["id"], "name": row["name"], "frequency": frequency[row["id"]]}
        for _, row in stream_lists(path, ("categories",))
        if row["id"] in frequency
    ]
    positive: dict[Any, set[int]] = defaultdict(set)
    incomplete: dict[Any, set[int]] = defaultdict(set)
    annotations, taken = [], []
    for _, row in stream_lists(path, ("annotations",)):
        image, category = row["image_id"], row["category_id"]
        if category not in frequency:
            continue
        stays = kept is None or image in kept[category]
        if stays and row.get("segmentation") and not row.get("iscrowd"):
            annotations.append({field: row[field] for field in _FIELDS if field in row})
            positive[image].add(category)
        else:
            taken.append({field: row[field] for field in _FIELDS[:4]})
            incomplete[image].add(category)
    images = []
    for _, row in stream_lists(path, ("images",)):
        shown = positive[row["id"]] | incomplete[row["id"]]
        lists = {
            "neg_category_ids": [c for c in frequency if c not in shown],
            "not_exhaustive_category_ids": sorted(positive[row["id"]] & incomplete[row["id"]]),
        }
        images.append({field: row[field] for field in _IMAGE_FIELDS if field in row} | lists)
    return {"images": images, "annotations": annotations, "categories": categories}, taken


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with open_atomic(path) as file:
        json.dump(content, file)
