"""COCO, Objects365 and LVIS: `images`, `annotations` and `categories` in JSON files, one a split.

The label of a class is its name; `category_ids` in dataset.json keeps the ids, which results in
COCO form need. Image ids are those of the file, as text. Crowd regions get the flags CROWD and
GROUP_OF, Objects365's `isfake` the flag DEPICTION. The `area` of a segment is kept for COCO and
LVIS, whose metrics tell small from large objects by it.

COCO and Objects365 label all classes on every photo, so there are no image-level labels
(`"exhaustive": true` in dataset.json). LVIS checks only some classes on a photo: those with boxes,
`neg_category_ids` (image-level labels of confidence ABSENT) and, of those with boxes,
`not_exhaustive_category_ids` (confidence NOT_EXHAUSTIVE). dataset.json gets the `frequency` of each
class. Photos of LVIS are looked for by `coco_url`, since some releases give them file names of the
COCO 2014 release.
"""

import glob
import json
import re
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.convert.annotations import (
    AREA_COLUMNS,
    BOX_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    Annotations,
    Columns,
    ImageTable,
)
from common.convert.classes import read_hierarchy
from common.convert.cleaning import check_class_ids, check_pixel_xywh
from common.convert.json_stream import stream_json
from common.convert.report import DROPPED, Report
from common.data.dataset import ABSENT, CROWD, DEPICTION, GROUP_OF, NOT_EXHAUSTIVE
from common.io.errors import UserError

_PREFIX = re.compile(
    r"^(instances|boxes|annotations|image_info|zhiyuan_objv2|objects365|lvis(_v[0-9._]*[0-9])?)_"
)
# Other files that the official archives put beside the instances.
_OTHER = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
_FREQUENCIES = ("r", "c", "f")


def read_coco(
    source: str,
    report: Report,
    spool_folder: Path,
    *,
    name: str = "coco",
    image_id: str = "id",
    hierarchy: Path | None = None,
) -> Annotations:
    """Reads one or several COCO files.

    Args:
      source: folder, file, pattern such as 'DIR/instances_*.json', or several with commas. The file
        name tells the split: instances_train2017.json -> train2017, boxes_val_a.json -> val_a.
      report: gets annotations of unknown images.
      spool_folder: for temporary files.
      name: of the set: coco, objects365 or lvis.
      image_id: 'id' = the images' id, 'file_stem' = file name without folder and extension, for
        sets whose files number their images each from 1.
      hierarchy: optional hierarchy of the category names.

    Raises:
      UserError: no such file, broken JSON, missing fields, categories that differ between files.
    """
    paths, search = _find_files(source, name == "lvis")
    images, files = ImageTable(), [str(path) for path in paths.values()]
    # Objects365 repeats the area of the box.
    areas = AREA_COLUMNS if name != "objects365" else {}
    columns, labels = Columns(BOX_COLUMNS | MASK_COLUMNS | areas), Columns(LABEL_COLUMNS)
    categories: dict[int, str] = {}
    frequencies: dict[int, str] = {}
    splits = {}
    spool = spool_folder / "masks.spool"
    with open(spool, "wb") as masks:
        for number, (split, path) in enumerate(paths.items()):
            content = _File(path, masks, lvis=name == "lvis")
            frequencies |= content.frequencies
            _merge_categories(categories, content.categories, path, files[0])
            places = _add_images(content, images, image_id)
            splits[split] = places[places >= 0]
            _add_boxes(content, places, images, categories, columns, number, report)
            _add_labels(content, places, categories, labels, number)
    class_labels, names = _labels(categories)
    boxes = columns.take()
    has_masks = bool(boxes["mask_length"].any())
    if not has_masks:
        for column in MASK_COLUMNS:
            del boxes[column]
    if areas and not np.isfinite(boxes["area"]).all():
        del boxes["area"]
    extra = {"exhaustive": name != "lvis", "category_ids": list(categories)}
    if name == "lvis":
        extra["frequency"] = _frequencies(categories, frequencies, files[-1])
    return Annotations(
        name=name,
        source=source,
        class_labels=class_labels,
        class_names=names,
        hierarchy=read_hierarchy(hierarchy, class_labels) if hierarchy else None,
        images=images,
        splits=splits,
        boxes=boxes,
        labels=labels.take(),
        files=files,
        search=search,
        mask_spool=spool if has_masks else None,
        extra=extra,
    )


_CONFIDENCES = {"neg_category_ids": ABSENT, "not_exhaustive_category_ids": NOT_EXHAUSTIVE}


class _File:
    """One file in compact form: columns of numbers instead of 30 million dictionaries."""

    def __init__(self, path: Path, masks, lvis: bool):
        self.path = path
        self._lvis = lvis
        self.categories: dict[int, str] = {}
        self.frequencies: dict[int, str] = {}
        self.image_index: dict[Any, int] = {}  # id in the file -> order of first mention
        self.image_files: dict[int, str] = {}  # only of images that are listed
        self.image_sizes: dict[int, tuple[int, int]] = {}
        self.image, self.category = array("i"), array("q")
        self.xywh, self.flags, self.row = array("f"), array("B"), array("q")
        self.area = array("d")
        # Image-level labels: image, category id, confidence.
        self.labels = (array("i"), array("q"), array("B"))
        self.mask_start, self.mask_length = array("q"), array("i")
        self._masks = masks
        readers = {
            "images": self._read_image,
            "annotations": self._read_annotation,
            "categories": self._read_category,
        }
        keys = []
        counts: Counter[str] = Counter()
        for key, value in stream_json(path):
            if key not in counts:
                keys.append(key)
            counts[key] += 1
            if key in readers and value is not None:
                if not isinstance(value, dict):
                    raise UserError(f"{path}: {key} number {counts[key]} is no object")
                try:
                    readers[key](value)
                except KeyError as error:
                    raise UserError(
                        f"{path}: {key} number {counts[key]} has no field {error}; found "
                        f"{', '.join(list(value)[:12])}"
                    ) from error
                except (TypeError, ValueError, OverflowError) as error:
                    raise UserError(
                        f"{path}: {key} number {counts[key]} has a wrong value ({error}): "
                        f"{json.dumps(value)[:150]}"
                    ) from error
        for key in ("images", "categories"):
            if key not in keys:
                raise UserError(f"{path}: no {key!r}; found {', '.join(keys[:8]) or 'nothing'}")

    def _index(self, raw_id: Any) -> int:
        return self.image_index.setdefault(raw_id, len(self.image_index))

    def _read_category(self, value: dict[str, Any]) -> None:
        number = _integer(value["id"])
        self.categories[number] = str(value["name"])
        if self._lvis:
            frequency = value["frequency"]
            if frequency not in _FREQUENCIES:
                raise ValueError(f"frequency {frequency!r}, expected 'r', 'c' or 'f'")
            self.frequencies[number] = frequency

    def _read_image(self, value: dict[str, Any]) -> None:
        index = self._index(value["id"])
        if index in self.image_files:
            raise UserError(f"{self.path}: image id {value['id']!r} is given twice")
        if self._lvis and value.get("coco_url"):
            file = "/".join(str(value["coco_url"]).split("/")[-2:])
        else:
            # LVIS-like files have only the address of the photo.
            file = value.get("file_name") or value["coco_url"]
        self.image_files[index] = str(file)
        self.image_sizes[index] = (_integer(value["height"]), _integer(value["width"]))
        if self._lvis:
            # Lists are missing in files of test sets.
            for key, confidence in _CONFIDENCES.items():
                for category in value.get(key) or ():
                    for column, item in zip(
                        self.labels, (index, _integer(category), confidence), strict=True
                    ):
                        column.append(item)

    def _read_annotation(self, value: dict[str, Any]) -> None:
        box = value["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {box!r}, expected [x, y, width, height]")
        self.image.append(self._index(value["image_id"]))
        self.category.append(_integer(value["category_id"]))
        self.xywh.extend(float("nan") if x is None else x for x in box)
        self.flags.append(
            (CROWD | GROUP_OF) * (value.get("iscrowd") == 1)
            | DEPICTION * (value.get("isfake") == 1)
        )
        area = value.get("area")
        self.area.append(float("nan") if area is None else area)
        row = value.get("id")
        self.row.append(row if isinstance(row, int) else len(self.row) + 1)
        mask = value.get("segmentation")
        text = json.dumps(mask, separators=(",", ":")).encode() if mask else b""
        self.mask_start.append(self._masks.tell() if text else 0)
        self.mask_length.append(len(text))
        self._masks.write(text)


def _integer(value: Any) -> int:
    """An id or a size; 3.0 counts, 3.5 and texts do not."""
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _find_files(source: str, lvis: bool) -> tuple[dict[str, Path], Path]:
    """Split -> file, and the folder in which photos are looked for."""
    found: list[Path] = []
    for part in source.split(","):
        folder = Path(part)
        if folder.is_dir():
            inside = sorted(folder.glob("*.json")) or sorted(folder.glob("annotations/*.json"))
            if lvis:
                # Lists of categories lie beside the annotations.
                found += [p for p in inside if re.match(r"lvis_(?!.*categories)", p.name)]
                continue
            found += [path for path in inside if not path.name.startswith(_OTHER)]
        else:
            found += [Path(name) for name in sorted(glob.glob(part))]
    if not found:
        raise UserError(f"--source={source}: no JSON file there")
    paths: dict[str, Path] = {}
    for path in found:
        split = _PREFIX.sub("", path.stem)
        if split in paths:
            raise UserError(
                f"{paths[split]} and {path} are both split {split!r}; choose files by a pattern, "
                f"such as --source='{path.parent}/instances_*.json'"
            )
        paths[split] = path
    search = Path(source) if Path(source).is_dir() else found[0].parent
    return paths, search.parent if search.name == "annotations" else search


def _merge_categories(known: dict[int, str], found: dict[int, str], path: Path, first: str) -> None:
    if not found:
        raise UserError(f"{path}: 'categories' is empty")
    if not known:
        known.update(found)
    elif known != found:
        odd = next(iter(dict(known.items() ^ found.items())))
        raise UserError(
            f"{path}: categories differ from those of {first}: id {odd} is "
            f"{found.get(odd)!r} here and {known.get(odd)!r} there"
        )


def _add_images(content: _File, images: ImageTable, image_id: str) -> np.ndarray:
    """Index in the image table for each image of the file, -1 = not listed under `images`."""
    places = np.full(len(content.image_index), -1, np.int64)
    for raw_id, index in content.image_index.items():
        if index not in content.image_files:
            continue
        file = content.image_files[index]
        place = images.add(str(raw_id) if image_id == "id" else Path(file).stem)
        if images.files.setdefault(place, file) != file:
            raise UserError(
                f"{content.path}: image id {raw_id!r} is {file} here and {images.files[place]} in "
                "another file; ids must be unique over the files (--image_id=file_stem takes the "
                "file names instead)"
            )
        height, width = content.image_sizes[index]
        if height <= 0 or width <= 0:
            raise UserError(
                f"{content.path}: image id {raw_id!r} has width {width} and height {height}; boxes "
                "in pixels mean nothing without them"
            )
        images.sizes[place] = (height, width)
        places[index] = place
    return places


def _add_boxes(
    content: _File,
    places: np.ndarray,
    images: ImageTable,
    categories: dict[int, str],
    columns: Columns,
    number: int,
    report: Report,
) -> None:
    image = places[np.frombuffer(content.image, np.int32)]
    row = np.frombuffer(content.row, np.int64)
    report.add("unknown image", DROPPED, str(content.path), row[image < 0])
    keep = image >= 0
    image = image[keep]
    category = np.frombuffer(content.category, np.int64)[keep]
    used, inverse = np.unique(category, return_inverse=True)
    check_class_ids(set(used.tolist()), set(categories), str(content.path))
    order = {category_id: i for i, category_id in enumerate(categories)}
    class_ = np.array([order.get(i, -1) for i in used.tolist()], np.int32)[inverse]
    sizes = np.zeros((len(images), 2), np.float32)
    for i in np.unique(image):
        sizes[i] = images.sizes[int(i)]
    area = np.frombuffer(content.area, np.float64)[keep]
    box = np.frombuffer(content.xywh, np.float32).reshape(-1, 4)[keep]
    check_pixel_xywh(box, sizes[image], str(content.path))
    box[:, 2:] += box[:, :2]
    box /= sizes[image][:, [1, 0, 1, 0]]
    columns.append(
        **{"class": class_, "image": image, "box": box, "row": row[keep]},
        area=area / sizes[image].astype(np.float64).prod(1),
        flags=np.frombuffer(content.flags, np.uint8)[keep],
        file=np.full(len(image), number, np.int32),
        mask_start=np.frombuffer(content.mask_start, np.int64)[keep],
        mask_length=np.frombuffer(content.mask_length, np.int32)[keep],
    )


def _add_labels(
    content: _File, places: np.ndarray, categories: dict[int, str], labels: Columns, number: int
) -> None:
    image, category, confidence = content.labels
    if not image:
        return
    order = {category_id: i for i, category_id in enumerate(categories)}
    indices = np.frombuffer(image, np.int32)
    names = [raw if isinstance(raw, int) else i for raw, i in content.image_index.items()]
    image = places[indices]
    labels.append(
        **{"class": [order.get(i, -1) for i in category], "image": image},
        row=np.array(names, np.int64)[indices],
        confidence=np.frombuffer(confidence, np.uint8),
        file=np.full(len(image), number, np.int32),
    )


def _frequencies(categories: dict[int, str], frequencies: dict[int, str], path: str) -> list[str]:
    """Frequency of each class in the order of the classes."""
    missing = [name for number, name in categories.items() if number not in frequencies]
    if missing:
        raise UserError(f"{path}: no frequency of category {missing[0]!r}")
    return [frequencies[number] for number in categories]


def _labels(categories: dict[int, str]) -> tuple[list[str], list[str]]:
    """Unique labels and names; a name that occurs twice gets its id behind it."""
    names = list(categories.values())
    counts = Counter(names)
    labels = [f"{n} ({i})" if counts[n] > 1 else n for i, n in categories.items()]
    return labels, names
