"""Detections as YOLO tools write them: a folder with one text file a photo.

A line is `class x y width height score` (centre and size, shares of the photo; without score it is
1). A file is called as its photo, below the same folders; a photo without file has no detections.
Numbers of classes are those of the `data.yaml` that the dataset was made of, else their places in
it.

Shape legend: n rows of a file.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common.data.dataset import Dataset
from common.io.atomic import atomic_folder
from common.io.errors import UserError
from common.io.paths import PathLike, check_regular, to_epath
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Rows


def class_numbers(dataset: Dataset) -> dict[int, str]:
    """Label of each class number."""
    numbers = range(dataset.num_classes)
    if dataset.meta["name"] == "yolo":
        numbers = dataset.meta.get("category_ids", numbers)
    return dict(zip(numbers, dataset.class_labels, strict=True))


def file_names(dataset: Dataset) -> list[str]:
    """Name of each image's text file, without extension: that of its photo, with the folders.

    Images of one photo, and of photos elsewhere than below the dataset's folder, are called by
    their ids.

    Raises:
      UserError: the id of one is the path of another.
    """
    paths = [Path(path.decode()) for path in dataset.image_paths]
    stems = [
        "" if path.is_absolute() or ".." in path.parts else path.with_suffix("").as_posix()
        for path in paths
    ]
    counts = Counter(stems)
    names = [
        stem if stem and counts[stem] == 1 else dataset.image_id(image)
        for image, stem in enumerate(stems)
    ]
    name, count = Counter(names).most_common(1)[0] if names else ("", 1)
    if count > 1:
        raise UserError(f"{dataset.directory}: {count} images have the file {name!r}.txt")
    return names


def write_labels(
    outgoing: Outgoing, output: PathLike, dataset: Dataset, digits: int | None = None
) -> None:
    """Writes the folder of a table, with a file for each covered image.

    Args:
      outgoing: the rows.
      output: folder, a new or an empty one: true labels lie in such folders, too.
      dataset: that the images and labels are of.
      digits: decimals; None = those that 32 bits hold.

    Raises:
      UserError: an image or a label that the dataset does not have, a folder with something in it,
        or one that cannot be written.
    """
    place = to_epath(output)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{output}: exists already, expected a new folder")
    image_ids = outgoing.reader.image_ids
    images = dataset.find_images(image_ids)
    if (images < 0).any():
        missing = image_ids[int(np.argmax(images < 0))]
        raise UserError(f"{dataset.directory}: no image {missing!r}, which the table covers")
    names = file_names(dataset)
    number = {label: n for n, label in class_numbers(dataset).items()}
    form = f"%d{' %.*f' * 5}" if digits else f"%d{' %.7g' * 5}"
    with atomic_folder(output) as folder:
        for index in np.flatnonzero(_selected(outgoing)).tolist():
            path = _below(Path(folder), names[images[index]], dataset)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        for chunk in outgoing.chunks():
            corners = chunk.boxes.astype(np.float64)
            centre = (corners[:, :2] + corners[:, 2:]) / 2
            values = np.column_stack([centre, corners[:, 2:] - corners[:, :2], chunk.scores])
            cuts = np.flatnonzero(np.diff(chunk.image_index, prepend=-1))
            for start, stop in zip(cuts, [*cuts[1:], len(chunk)], strict=True):
                lines = []
                for row in range(start, stop):
                    label = chunk.labels[chunk.label_index[row]]
                    if label not in number:
                        raise UserError(f"{dataset.directory}: no class {label!r}")
                    places = values[row].tolist()
                    if digits:
                        places = [item for value in places for item in (digits, value)]
                    lines.append(form % (number[label], *places))
                path = _below(Path(folder), names[images[chunk.image_index[start]]], dataset)
                path.write_text("\n".join(lines) + "\n")


def _below(folder: Path, name: str, dataset: Dataset) -> Path:
    """The text file of a name, which may be an id that is no path below a folder."""
    file = Path(f"{name}.txt")
    if file.is_absolute() or ".." in file.parts:
        raise UserError(f"{dataset.directory}: image {name!r}, expected an id to call a file by")
    return folder / file


def _selected(outgoing: Outgoing) -> np.ndarray:
    if outgoing.selected is not None:
        return outgoing.selected
    return np.ones(len(outgoing.reader.image_ids), bool)


def read_labels(folder: Path, dataset: Dataset, cover: Callable[[str], None]) -> Iterator[Rows]:
    """Reads a folder, one file after the other.

    Args:
      folder: the text files are somewhere below it, called as their photos.
      dataset: that the photos and classes are of.
      cover: called with the id of the image of every file, empty ones too.

    Raises:
      UserError: names file and line: a name that no photo or more than one has, an unknown class,
        or no numbers.
    """
    owner: dict[str, int] = {}
    for image, stem in enumerate(file_names(dataset)):
        for name in {stem, os.path.basename(stem), dataset.image_id(image)}:
            owner[name] = image if owner.setdefault(name, image) == image else -1
    labels = class_numbers(dataset)
    places = {number: place for place, number in enumerate(labels)}
    for path in sorted(folder.rglob("*.txt")):
        if path.name == "classes.txt":
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        image = owner.get(stem, owner.get(os.path.basename(stem), -2))
        if image < 0:
            found = "no photo" if image == -2 else "several photos"
            raise UserError(f"{path}: {found} of {dataset.directory} called {stem}")
        cover_at(cover, dataset.image_id(image), path)
        values = _read_file(path, places)
        if not len(values):
            continue
        half = values[:, 3:5] / 2
        boxes = np.concatenate([values[:, 1:3] - half, values[:, 1:3] + half], axis=1)
        yield Rows(
            image_ids=[dataset.image_id(image)],
            image_index=np.zeros(len(values), np.int64),
            labels=list(labels.values()),
            label_index=np.array([places[int(number)] for number in values[:, 0]], np.int64),
            scores=values[:, 5].astype(np.float32),
            boxes=_without_rounding(boxes).astype(np.float32),
            numbers=np.arange(1, len(values) + 1),
        )


def cover_at(cover: Callable[[str], None], image_id: str, path: Path) -> None:
    try:
        cover(image_id)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _without_rounding(boxes: np.ndarray) -> np.ndarray:
    """Boxes cut at the edge of the photo where rounded decimals put them beyond it."""
    beyond = np.maximum(-boxes, boxes - 1)
    return np.where(beyond < 1e-3, np.clip(boxes, 0, 1), boxes)


def _read_file(path: Path, places: dict[int, int]) -> np.ndarray:
    """(n, 6) class number, centre, size and score."""
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read it ({error})") from error
    rows = []
    for line, text in enumerate(filter(str.strip, lines), start=1):
        try:
            numbers = [float(word) for word in text.split()]
            if len(numbers) not in (5, 6) or not np.isfinite(numbers).all():
                raise ValueError(f"{len(numbers)} numbers")
            if numbers[0] not in places:
                raise ValueError(f"class {numbers[0]:g} is unknown")
        except ValueError as error:
            raise UserError(
                f"{path}: row {line}: found {text[:60]!r} ({error}), expected class x y width "
                "height score"
            ) from error
        rows.append((*numbers, 1.0)[:6])
    return np.array(rows, np.float64).reshape(-1, 6)
