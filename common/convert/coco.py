"""COCO, Objects365 and LVIS: `images`, `annotations` and `categories` in JSON files, one a split.

The label of a class is its name; `category_ids` in dataset.json keeps the ids, which results in
COCO form need. Image ids are those of the file, as text. Crowd regions get the flags CROWD and
GROUP_OF, Objects365's `isfake` the flag DEPICTION. The `area` of a segment is kept for COCO and
LVIS, whose metrics tell small from large objects by it.

Masks that cannot be drawn are left out and listed (`common.convert.coco_masks`); their boxes stay.

COCO and Objects365 label all classes on every photo, so there are no image-level labels
(`"exhaustive": true` in dataset.json). LVIS checks only some classes on a photo: those with boxes,
`neg_category_ids` (image-level labels of confidence ABSENT) and, of those with boxes,
`not_exhaustive_category_ids` (confidence NOT_EXHAUSTIVE). dataset.json gets the `frequency` of each
class. Photos of LVIS are looked for by `coco_url`, since some releases give them file names of the
COCO 2014 release.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

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
from common.convert.cleaning import check_class_ids
from common.convert.coco_file import CocoFile
from common.convert.report import DROPPED, REPAIRED, Report
from common.data.dataset import ABSENT
from common.data.photo_names import normal, photo_name, split_extension
from common.io.errors import UserError

_PREFIX = re.compile(
    r"^(instances|boxes|annotations|image_info|zhiyuan_objv2|objects365|lvis(_v[0-9._]*[0-9])?)_"
)
_ROBOFLOW = "_annotations.coco.json"  # one a folder, which is the split
# Other files that the official archives put beside the instances.
_OTHER = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


def read_coco(
    source: str,
    report: Report,
    spool_folder: Path,
    *,
    name: str = "coco",
    image_id: str = "auto",
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
    categories: dict[str, str] = {}
    frequencies: dict[str, str] = {}
    splits = {}
    spool = spool_folder / "masks.spool"
    with open(spool, "wb") as masks:
        contents = [
            CocoFile(path, masks, lvis=name == "lvis", report=report) for path in paths.values()
        ]
    for content in contents:
        frequencies |= content.frequencies
        _merge_categories(categories, content.categories, content.path, files[0])
    if image_id == "auto":
        image_id = _identity(contents)
    order = {category: i for i, category in enumerate(_by_id(categories))}
    names = _ids(contents, [_folder_of(path, search) for path in paths.values()], image_id)
    for number, (split, content) in enumerate(zip(paths, contents, strict=True)):
        places = _add_images(content, images, *names[number])
        splits[split] = places
        _add_boxes(content, places, order, columns, number, report)
        _add_labels(content, places, order, labels, number)
    del contents
    categories = {category: categories[category] for category in _by_id(categories)}
    class_labels, class_names = _labels(categories)
    boxes = columns.take()
    has_masks = bool(boxes["mask_length"].any())
    if not has_masks:
        for column in MASK_COLUMNS:
            del boxes[column]
    if areas and not np.isfinite(boxes["area"]).all():
        del boxes["area"]
    extra = {"exhaustive": name != "lvis", "category_ids": [_plain(i) for i in categories]}
    if name == "lvis":
        extra["frequency"] = _frequencies(categories, frequencies, files[-1])
    if image_id == "file_stem":
        extra["image_id"] = image_id
    return Annotations(
        name=name,
        source=source,
        class_labels=class_labels,
        class_names=class_names,
        hierarchy=read_hierarchy(hierarchy, class_labels),
        images=images,
        splits=splits,
        boxes=boxes,
        labels=_without_contradictions(labels.take(), boxes, files, report),
        files=files,
        search=search,
        mask_spool=spool if has_masks else None,
        unsized={i for i, size in images.sizes.items() if not all(size)},
        extra=extra,
    )


def _find_files(source: str, lvis: bool) -> tuple[dict[str, Path], Path]:
    """Split -> file, and the folder in which photos are looked for."""
    files: list[Path] = []
    for part in [source] if os.path.exists(source) else source.split(","):
        found = _files_at(part, lvis)
        if not found:
            raise UserError(f"--source={part}: no JSON file there")
        files += found
    paths: dict[str, Path] = {}
    for path in files:
        split = split_name(path)
        if split in paths:
            raise UserError(
                f"{paths[split]} and {path} are both split {split!r}; choose files by a pattern, "
                f"such as --source='{path.parent}/instances_*.json'"
            )
        paths[split] = path
    search = Path(source) if Path(source).is_dir() else files[0].parent
    if len(files) > 1 and all(path.name == _ROBOFLOW for path in files):
        search = Path(os.path.commonpath([path.parent.absolute() for path in files]))
    return paths, search.parent if search.name == "annotations" else search


def _files_at(part: str, lvis: bool) -> list[Path]:
    """The annotation files of a folder, a file or a pattern."""
    folder = Path(part)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        return [Path(name) for name in sorted(glob.glob(part))]
    inside = sorted(folder.glob("*.json")) or sorted(folder.glob("annotations/*.json"))
    if lvis:
        # Lists of categories lie beside the annotations.
        return [path for path in inside if re.match(r"lvis_(?!.*categories)", path.name)]
    inside = inside or sorted(folder.glob(f"*/{_ROBOFLOW}"))
    return [path for path in inside if not path.name.startswith(_OTHER)]


def _folder_of(path: Path, search: Path) -> str:
    """Folder of the photos that a file names, where they lie beside it."""
    if path.name != _ROBOFLOW or not path.absolute().is_relative_to(search.absolute()):
        return ""
    folder = path.absolute().parent.relative_to(search.absolute()).as_posix()
    return "" if folder == "." else folder


def _by_id(categories: Iterable[str]) -> list[str]:
    """Category ids in the order of their numbers, then the other texts."""
    return sorted(categories, key=lambda i: (not _is_number(i), int(i) if _is_number(i) else 0, i))


def _plain(category: str) -> int | str:
    """The id as files in COCO form write it."""
    return int(category) if _is_number(category) else category


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", text) is not None


def split_name(path: Path) -> str:
    """The split that a file's name tells: instances_train2017.json is train2017."""
    if path.name == _ROBOFLOW:
        return path.parent.name
    return _PREFIX.sub("", Path(path.name.removesuffix(".gz")).stem)


def _merge_categories(known: dict[str, str], new: dict[str, str], path: Path, first: str) -> None:
    if not new:
        raise UserError(f"{path}: 'categories' is empty")
    if not known:
        known.update(new)
    elif known != new:
        odd = next(iter(dict(known.items() ^ new.items())))
        here, there = (repr(c[odd]) if odd in c else "missing" for c in (new, known))
        raise UserError(
            f"{path}: categories differ from those of {first}: id {odd} is {here} here and "
            f"{there} there"
        )


def _identity(contents: Sequence[CocoFile]) -> str:
    """What tells images apart: 'id', or 'file_stem' where files number theirs each for itself."""
    if all(content.path.name == _ROBOFLOW for content in contents):
        return "file_stem"
    first: dict[str, str] = {}
    for content in contents:
        for number, index in content.image_index.items():
            file = content.image_files[index]
            if first.setdefault(number, file) != file:
                print(
                    f"{content.path}: image id {number} is {file} here and {first[number]} in "
                    "another file: images are called by their file names (--image_id=file_stem)",
                    flush=True,
                )
                return "file_stem"
    return "id"


def _ids(
    contents: Sequence[CocoFile], folders: Sequence[str], image_id: str
) -> list[tuple[list[str], list[str]]]:
    """Ids and files of the images of each file; of two photos of one name the paths are ids."""
    files = [
        [f"{folder}/{file}" if folder else file for file in content.image_files]
        for content, folder in zip(contents, folders, strict=True)
    ]
    if image_id == "id":
        return list(zip([list(content.image_index) for content in contents], files, strict=True))
    stems = Counter(photo_name("", file) for file in {file for part in files for file in part})
    names = []
    for part in files:
        short = [photo_name("", file) for file in part]
        long = [split_extension(normal(file))[0] for file in part]
        names.append([s if stems[s] == 1 else whole for s, whole in zip(short, long, strict=True)])
    return list(zip(names, files, strict=True))


def _add_images(
    content: CocoFile, images: ImageTable, ids: Sequence[str], files: Sequence[str]
) -> np.ndarray:
    """Index in the image table for each image of the file."""
    places = np.zeros(len(ids), np.int64)
    for index, (name, file) in enumerate(zip(ids, files, strict=True)):
        place = images.add(name)
        if images.files.setdefault(place, file) != file:
            raise UserError(
                f"{content.path}: image id {name} is {file} here and {images.files[place]} in "
                "another file; ids must be unique over the files (--image_id=file_stem takes the "
                "file names instead)"
            )
        images.sizes[place] = content.image_sizes[index]
        places[index] = place
    return places


def _add_boxes(
    content: CocoFile,
    places: np.ndarray,
    order: dict[str, int],
    columns: Columns,
    number: int,
    report: Report,
) -> None:
    image, row = content.images(), np.frombuffer(content.row, np.int64)
    keep = image >= 0
    if len(keep) and not keep.any():
        raise UserError(
            f"{content.path}: none of the {len(keep):,} annotations is of an image of the file "
            f"(its images have ids like {next(iter(content.image_index), 'none')!r})"
        )
    report.add("unknown image", DROPPED, str(content.path), row[~keep])
    ids, category = content.category_ids, np.frombuffer(content.category, np.int64)[keep]
    used = [ids[place] for place in np.unique(category)]
    check_class_ids(used, list(order), str(content.path))
    classes = np.array([order.get(i, -1) for i in ids], np.int32)
    columns.append(
        **{"class": classes[category]},
        image=places[image[keep]],
        box=content.boxes()[keep],
        row=row[keep],
        area=content.areas()[keep],
        flags=np.frombuffer(content.flags, np.uint8)[keep],
        file=np.full(int(keep.sum()), number, np.int32),
        **_masks(content, report, keep),
    )


def _masks(
    content: CocoFile, report: Report, keep: Bool[np.ndarray, " m"]
) -> dict[str, np.ndarray]:
    """Columns of the masks; those that were left out or lost parts are reported."""
    masks, rows = content.masks, np.frombuffer(content.row, np.int64)
    assert masks is not None, "the file was read without masks"
    wrong = masks.drop_other_shapes(content.photo_sizes(), rows)
    start, length = np.frombuffer(masks.start, np.int64), np.frombuffer(masks.length, np.int32)
    length = np.where(wrong, np.int32(0), length)
    if length.any():  # else: a set of boxes, whose segmentations are empty lists
        for reason, found in masks.repairs.items():
            report.add(reason, REPAIRED, str(content.path), found)
    check = np.where(wrong, np.uint32(0), np.frombuffer(masks.check, np.uint32))
    return {"mask_start": start[keep], "mask_length": length[keep], "mask_check": check[keep]}


def _add_labels(
    content: CocoFile, places: np.ndarray, order: dict[str, int], labels: Columns, number: int
) -> None:
    image, category, confidence = content.labels
    if not image:
        return
    indices = np.frombuffer(image, np.int32)
    ids = content.category_ids
    names = [int(i) if _is_number(i) else place for i, place in content.image_index.items()]
    labels.append(
        **{"class": [order.get(ids[place], -1) for place in category], "image": places[indices]},
        row=np.array(names, np.int64)[indices],
        confidence=np.frombuffer(confidence, np.uint8),
        file=np.full(len(indices), number, np.int32),
    )


def _without_contradictions(
    labels: dict[str, np.ndarray], boxes: dict[str, np.ndarray], files: list[str], report: Report
) -> dict[str, np.ndarray]:
    """Leaves out that a class is absent from a photo on which objects of it are annotated."""
    keys = [table["image"].astype(np.int64) << 32 | table["class"] for table in (labels, boxes)]
    wrong = np.isin(*keys) & (labels["class"] >= 0) & (labels["confidence"] == ABSENT)
    rows = np.flatnonzero(wrong)
    reason = "category listed as absent where it is annotated"
    report.add(reason, DROPPED, [files[i] for i in labels["file"][rows]], labels["row"][rows])
    return {name: column[~wrong] for name, column in labels.items()}


def _frequencies(categories: dict[str, str], frequencies: dict[str, str], path: str) -> list[str]:
    """Frequency of each class in the order of the classes."""
    missing = [name for number, name in categories.items() if number not in frequencies]
    if missing:
        raise UserError(f"{path}: no frequency of category {missing[0]!r}")
    return [frequencies[number] for number in categories]


def _labels(categories: dict[str, str]) -> tuple[list[str], list[str]]:
    """Unique labels and names; a name that occurs twice gets its id behind it."""
    names = list(categories.values())
    counts = Counter(names)
    labels = [f"{n} ({i})" if counts[n] > 1 else n for i, n in categories.items()]
    return labels, names
