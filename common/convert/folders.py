"""A folder of photos for each class, each photo with one box: all of it (paper section 5.9).

    SOURCE/CLASS/PHOTO or SOURCE/SPLIT/CLASS/PHOTO

So pictures that show one thing, as a search engine finds them, become a source of boxes for classes
that have few. Folders are called as the labels or the names of the class list, or are the classes.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from common.convert.annotations import BOX_COLUMNS, LABEL_COLUMNS, Annotations, Columns, ImageTable
from common.convert.classes import read_hierarchy
from common.convert.photos import walk
from common.convert.report import NOTED, Report
from common.data.class_list import read_class_list
from common.data.dataset import PRESENT
from common.data.photo_names import EXTENSIONS, normal
from common.io.errors import UserError

_SPLIT = "train"  # of sources without folders of splits


def read_folders(
    source: Path, report: Report, *, classes: Path | None = None, hierarchy: Path | None = None
) -> Annotations:
    """Reads photos by class.

    Args:
      source: the folder.
      report: gets classes without photos.
      classes: class list (label,name) whose labels or names the folders are called; without it the
        folders are the classes, sorted.
      hierarchy: optional hierarchy of the class labels.

    Raises:
      UserError: no photos, photos outside a folder of a class, or a folder that is no class.
    """
    if not source.is_dir():
        raise UserError(f"--source={source}: no such folder")
    photos = [p for p in map(normal, walk(source)) if p.lower().endswith(EXTENSIONS)]
    if not photos:
        raise UserError(f"--source={source}: no photos below it, expected CLASS/PHOTO")
    depths = {len(PurePosixPath(path).parts): path for path in reversed(photos)}
    if depths.keys() not in ({2}, {3}):
        found = " and ".join(repr(path) for _, path in sorted(depths.items())[:2])
        raise UserError(
            f"--source={source}: found {found}, expected all photos as CLASS/PHOTO, or all as "
            "SPLIT/CLASS/PHOTO"
        )
    folders = sorted({PurePosixPath(path).parts[-2] for path in photos})
    labels, names = read_class_list(classes)[:2] if classes else (folders, folders)
    class_of = _classes_of(folders, labels, names, f"{classes or source}")
    images, columns, verified = ImageTable(), Columns(BOX_COLUMNS), Columns(LABEL_COLUMNS)
    members: dict[str, list[int]] = {}
    chosen = []
    for path in photos:
        parts = PurePosixPath(path).parts
        stem = path.rpartition(".")[0]
        index = images.add(stem if images.find(stem) < 0 else path)
        images.files[index] = path
        members.setdefault(parts[0] if len(parts) == 3 else _SPLIT, []).append(index)
        chosen.append(class_of[parts[-2]])
    count = len(photos)
    rows = {"image": np.arange(count), "class": chosen, "file": np.zeros(count)}
    rows["row"] = np.arange(1, count + 1)
    whole = np.tile(np.array([0, 0, 1, 1], np.float32), (count, 1))
    columns.append(**rows, box=whole, flags=np.zeros(count))
    verified.append(**rows, confidence=np.full(count, PRESENT))
    empty = [labels[i] for i in range(len(labels)) if i not in set(chosen)]
    if classes:
        report.add("class without a photo", NOTED, str(source), empty)
    return Annotations(
        name="folders",
        source=str(source),
        class_labels=list(labels),
        class_names=list(names),
        hierarchy=read_hierarchy(hierarchy, labels),
        images=images,
        splits={name: np.array(rows) for name, rows in members.items()},
        boxes=columns.take(),
        labels=verified.take(),
        files=[str(source)],
        search=source,
        extra={"exhaustive": False},
    )


def _classes_of(
    folders: list[str], labels: list[str], names: list[str], where: str
) -> dict[str, int]:
    """Class of each folder: of its label, else of its name.

    Raises:
      UserError: a folder is neither, or the name of several classes.
    """
    found = {}
    for folder in folders:
        places = [i for i, label in enumerate(labels) if label == folder]
        places = places or [i for i, name in enumerate(names) if name == folder]
        if len(places) != 1:
            several = f"the name of {len(places)} classes" if places else "no class"
            raise UserError(
                f"{where}: folder {folder!r} is {several} of the list, expected a label such as "
                f"{labels[0]!r} or a name such as {names[0]!r}"
            )
        found[folder] = places[0]
    return found
