"""OpenImages: Challenge 2019 files and the V4 to V7 files.

Files are found by pattern below the source folder, columns by header name. Classes are keyed on the
MID: names are not unique. Rows of an image need not be together; nothing is expanded to parents.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.convert import openimages_masks
from common.convert.annotations import BOX_COLUMNS, LABEL_COLUMNS, Annotations, Columns
from common.convert.annotations import ImageTable as Images
from common.convert.classes import read_hierarchy
from common.convert.cleaning import check_layout
from common.convert.instance_boxes import add_instance_boxes
from common.convert.photos import walk
from common.convert.report import DROPPED, EXAMPLES, Report
from common.data.class_list import read_class_list
from common.data.dataset import DEPICTION, GROUP_OF, INSIDE, OCCLUDED, TRUNCATED
from common.io.csv_columns import stream_csv
from common.io.errors import UserError

EDITIONS = ("challenge", "v5")
SPLITS = ("train", "validation", "test")
_COORDINATES = ("XMin", "YMin", "XMax", "YMax")
_FLAGS = {
    "IsGroupOf": GROUP_OF,
    "IsOccluded": OCCLUDED,
    "IsTruncated": TRUNCATED,
    "IsDepiction": DEPICTION,
    "IsInside": INSIDE,
}
_CSV = r"\.csv(\.gz|\.bz2)?"
# Task -> role -> regular expressions of file names, the first that matches any file wins.
_PATTERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "detection": {
        "challenge boxes": (r".*-detection-bbox" + _CSV,),
        "challenge labels": (r".*-detection-human-imagelabels" + _CSV,),
        "v5 boxes": (r".*-annotations-bbox" + _CSV,),
        "v5 labels": (
            r".*(?<!detection)-human-imagelabels-boxable" + _CSV,
            r".*(?<!detection)-human-imagelabels" + _CSV,
        ),
        "classes": (
            r".*classes-description-500\.csv",
            r".*class-descriptions-boxable\.csv",
            r".*class-descriptions\.csv",
        ),
        "hierarchy": (r".*label500-hierarchy\.json", r".*bbox_labels_.*hierarchy\.json"),
    },
    "segmentation": {
        "challenge boxes": (r".*-segmentation-bbox" + _CSV,),
        "challenge labels": (r".*-segmentation-labels" + _CSV,),
        "classes": (r".*classes-description-segmentable\.csv",),
        "hierarchy": (r".*segmentable-hierarchy\.json",),
    },
}
_MASK_FILES = (r".*-segmentation-masks" + _CSV, r".*-annotations-object-segmentation" + _CSV)


@dataclasses.dataclass(frozen=True)
class _Sources:
    boxes: dict[str, Path]  # split -> file
    labels: dict[str, Path]
    masks: dict[str, Path]
    classes: Path
    hierarchy: Path | None


def read_openimages(
    source: Path,
    report: Report,
    spool_folder: Path,
    *,
    task: str = "detection",
    edition: str = "auto",
    classes: Path | None = None,
    hierarchy: Path | None = None,
    mask_folder: Path | None = None,
    boxes_from_masks: Sequence[str] = (),
) -> Annotations:
    """Reads the official files below a folder.

    Args:
      source: folder with the box, image-label, class, hierarchy and mask files.
      report: gets the rows that mean nothing.
      spool_folder: for temporary files.
      task: 'detection' (500 or 600 classes) or 'segmentation' (the 300 segmentable classes).
      edition: 'challenge' or 'v5', whose box and image-label files to read; 'auto' = the
        challenge's if they are there.
      classes: class list instead of the one found.
      hierarchy: hierarchy instead of the one found.
      mask_folder: where the mask PNGs lie; by default below `source`.
      boxes_from_masks: classes, see `instance_boxes.add_instance_boxes`.

    Raises:
      UserError: a file is missing, found twice or broken.
    """
    sources = _find_sources(source, task, edition, classes, hierarchy)
    class_labels, class_names, _ = read_class_list(sources.classes)
    images, files = Images(), list[str]()
    splits: dict[str, list[np.ndarray]] = {}
    box_columns, label_columns = Columns(BOX_COLUMNS), Columns(LABEL_COLUMNS)
    class_index = {label: i for i, label in enumerate(class_labels)}
    for split, path in sources.boxes.items():
        members = _read_boxes(path, class_index, images, box_columns, len(files))
        files.append(str(path))
        splits.setdefault(split, []).append(members)
    for split, path in sources.labels.items():
        members = _read_labels(path, class_index, images, label_columns, len(files), report)
        files.append(str(path))
        splits.setdefault(split, []).append(members)
    boxes = box_columns.take()
    annotations = Annotations(
        name=f"openimages {task}",
        source=str(source),
        class_labels=class_labels,
        class_names=class_names,
        hierarchy=read_hierarchy(sources.hierarchy, class_labels),
        images=images,
        splits={name: np.unique(np.concatenate(parts)) for name, parts in splits.items()},
        boxes=boxes,
        labels=label_columns.take(),
        files=files,
        search=source,
        extra={"exhaustive": False},
    )
    if boxes_from_masks:
        masks = list(sources.masks.values())
        add_instance_boxes(annotations, masks, boxes_from_masks, report)
    if sources.masks:
        openimages_masks.attach(
            annotations,
            list(sources.masks.values()),
            mask_folder or source,
            spool_folder / "masks.spool",
            class_index,
            report,
        )
    return annotations


def _find_sources(
    source: Path, task: str, edition: str, classes: Path | None, hierarchy: Path | None
) -> _Sources:
    if not source.is_dir():
        raise UserError(f"--source={source}: no such folder")
    suffixes = (".csv", ".json", ".gz", ".bz2")
    names = [path for path in walk(source) if path.endswith(suffixes)]
    patterns = _PATTERNS[task]

    def by_split(role: str, expressions: tuple[str, ...]) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in _matching(names, expressions):
            split = _split_of(path)
            if split in files:
                raise UserError(
                    f"{source}: two {role} files for split {split}: {files[split]} and "
                    f"{source / path}; keep one of them below --source"
                )
            if split:
                files[split] = source / path
        return {split: files[split] for split in SPLITS if split in files}

    def single(role: str) -> Path | None:
        matches = _matching(names, patterns[role])
        if len(matches) > 1:
            raise UserError(
                f"{source}: several {role} files: {', '.join(matches[:4])}; choose one by --{role}"
            )
        return source / matches[0] if matches else None

    there = {
        name: boxes
        for name in EDITIONS
        if (boxes := by_split("box", patterns.get(f"{name} boxes", ())))
    }
    chosen = next(iter(there), None) if edition == "auto" else edition
    for other in there.keys() - {chosen}:
        print(
            f"{source}: reads the box files of the {chosen}; those of {other} "
            f"({', '.join(there[other])}) lie beside and are not read (--boxes={other} reads them)",
            flush=True,
        )
    if chosen not in there:
        expected = " or ".join(
            f"challenge-2019-{split}-{task}-bbox.csv" for split in ("train", "validation")
        )
        raise UserError(
            f"{source}: no box file of --boxes={edition}; expected names such as {expected}"
            + (" or train-annotations-bbox.csv" if task == "detection" else "")
        )
    labels = patterns.get(f"{chosen} labels", ())
    if edition == "auto":
        labels += patterns.get("v5 labels", ())
    classes = classes or single("classes")
    if classes is None:
        raise UserError(f"{source}: no class list found; give one by --classes=FILE")
    return _Sources(
        boxes=there[chosen],
        labels=by_split("image-label", labels),
        masks=by_split("mask", _MASK_FILES),
        classes=classes,
        hierarchy=hierarchy or single("hierarchy"),
    )


def _matching(names: list[str], expressions: tuple[str, ...]) -> list[str]:
    for expression in expressions:
        matches = [name for name in names if re.fullmatch(expression, Path(name).name)]
        if matches:
            return matches
    return []


def _split_of(path: str) -> str | None:
    words = re.split(r"[-_.]", Path(path).name)
    return next((split for split in SPLITS if split in words or split[:3] in words), None)


def _read_boxes(
    path: Path, class_index: dict[str, int], images: Images, columns: Columns, file: int
) -> np.ndarray:
    required = {"ImageID": pa.string(), "LabelName": pa.string()}
    required |= {name: pa.float32() for name in _COORDINATES}
    members: list[np.ndarray] = []
    for line, batch in stream_csv(path, required, {name: pa.int8() for name in _FLAGS}):
        image = _image_indices(batch, images)
        box = np.stack([_floats(batch[name]) for name in _COORDINATES], axis=1)
        if not members:
            check_layout(box, str(path), "XMin, YMin, XMax, YMax")
        flags = np.zeros(len(image), np.uint8)
        for name in set(_FLAGS) & set(batch.schema.names):
            # -1 means unknown (V4 and later), as does an empty field.
            is_set = batch[name].fill_null(0).to_numpy(False) == 1
            flags |= is_set * np.uint8(_FLAGS[name])
        class_ = _class_indices(batch, class_index)
        if not members and (class_ < 0).all():
            first = batch["LabelName"][0].as_py()
            raise UserError(
                f"{path}: none of the first {len(class_):,} rows has a known class: LabelName is "
                f"{first!r} in row {line}, the classes have labels like {next(iter(class_index))!r}"
            )
        rows = np.arange(line, line + len(image))
        columns.append(
            **{"image": image, "class": class_, "box": box, "flags": flags, "row": rows},
            file=np.full(len(image), file, np.int32),
        )
        members.append(np.unique(image))
    return _members(members)


def _read_labels(
    path: Path,
    class_index: dict[str, int],
    images: Images,
    columns: Columns,
    file: int,
    report: Report,
) -> np.ndarray:
    required = {"ImageID": pa.string(), "LabelName": pa.string(), "Confidence": pa.float32()}
    members: list[np.ndarray] = []
    for line, batch in stream_csv(path, required):
        image = _image_indices(batch, images)
        confidence = _floats(batch["Confidence"])
        verified = (confidence == 0) | (confidence == 1)
        wrong = np.flatnonzero(~verified)
        report.add(
            "image label with a confidence that is neither 0 nor 1",
            DROPPED,
            str(path),
            wrong + line,
            [f"Confidence {value:.6g}" for value in confidence[wrong[:EXAMPLES]]],
        )
        columns.append(
            **{"image": image[verified], "class": _class_indices(batch, class_index)[verified]},
            confidence=confidence[verified],
            row=(np.arange(len(image)) + line)[verified],
            file=np.full(int(verified.sum()), file, np.int32),
        )
        members.append(np.unique(image))
    return _members(members)


def _members(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int32)


def _image_indices(batch: pa.RecordBatch, images: Images) -> np.ndarray:
    coded = batch["ImageID"].dictionary_encode()
    return images.add_all(coded.dictionary.to_pylist())[coded.indices.to_numpy(False)]


def _class_indices(batch: pa.RecordBatch, class_index: dict[str, int]) -> np.ndarray:
    coded = batch["LabelName"].dictionary_encode()
    known = [class_index.get(label, -1) for label in coded.dictionary.to_pylist()]
    return np.array(known, np.int32)[coded.indices.to_numpy(False)]


def _floats(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float32)  # null becomes NaN
