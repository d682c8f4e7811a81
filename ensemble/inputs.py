"""Opens the detections tables of an ensemble and checks that they belong together.

The tables must cover the same images and use the labels of one vocabulary; both is checked before
the first row is read. The rows themselves are checked as `ensemble.chunks` reads them.

Shape legend: C labels found in a table, i images of a table.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32

from common.io.errors import UserError
from common.io.paths import resolved
from common.tables import DetectionsReader

_NAMED = re.compile(r"([\w.+-]+)=(.+)")


@dataclasses.dataclass(frozen=True)
class Table:
    """One opened input.

    Attributes:
      name: of the model, unique among the inputs.
      reader: of the table.
      source_labels: labels found in the table, sorted.
      label_codes: class index of each source label, -1 for labels that a mapping drops. A mapping
        with several targets gives more columns, filled up by -1.
      image_codes: image index of each image of the reader, -1 for images left out; None when the
        reader's images are the images of the ensemble.
    """

    name: str
    reader: DetectionsReader
    source_labels: list[str]
    label_codes: Int32[np.ndarray, "C targets"]
    image_codes: Int32[np.ndarray, " i"] | None


@dataclasses.dataclass(frozen=True)
class Tables:
    """Opened inputs with their common images (I, sorted ids) and classes (K labels)."""

    tables: list[Table]
    image_ids: list[str]
    labels: list[str]

    @property
    def names(self) -> list[str]:
        return [table.name for table in self.tables]

    @property
    def num_rows(self) -> int:
        return sum(table.reader.num_rows for table in self.tables)

    @property
    def expanded(self) -> bool:
        return bool(self.tables[0].reader.metadata.get("expanded"))


def open_tables(
    inputs: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    coverage: str = "same",
    mappings: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> Tables:
    """Opens tables and makes sure that they belong together.

    Args:
      inputs: paths, or `name=path`. A table without a name is called by as much of its path as
        tells it from the others (the file name without ending, mostly).
      labels: classes, in the dataset's order. None takes the labels that the tables hold, sorted.
      coverage: "same" refuses tables that cover different images, "union" takes an image that a
        table does not cover for one without detections, "intersection" leaves such images out.
      mappings: by name, for tables of another vocabulary: label there -> labels here (such as
        `ClassMapping.targets`); detections of other labels are dropped.

    Raises:
      UserError: no or unreadable tables, no table with rows, other labels, other images, parent
        classes in some tables only, or a mapping for a model that is no input.
    """
    paths, names = parse_inputs(inputs)
    mappings = dict(mappings or {})
    for name in mappings:
        check_known(name, names, "mapping")
    readers: list[DetectionsReader] = []
    for path in paths:
        reader = DetectionsReader(path, like=readers[0] if readers else None)
        if not reader.num_rows:
            print(f"{path}: no detections ({len(reader.image_ids)} images covered)", flush=True)
        readers.append(reader)
    if not any(reader.num_rows for reader in readers):
        raise UserError(f"{', '.join(map(str, paths))}: no detections in any table, expected rows")
    _check_expanded(readers)
    image_ids, image_codes = _common_images(readers, coverage)
    label_rows = [_find_labels(reader) for reader in readers]
    classes = _common_labels(readers, names, label_rows, labels, mappings)
    codes = {label: code for code, label in enumerate(classes)}
    tables = []
    for reader, name, rows, table_images in zip(
        readers, names, label_rows, image_codes, strict=True
    ):
        mapping = mappings.get(name)
        sources = sorted(rows)
        there = [[label] if mapping is None else mapping.get(label, ()) for label in sources]
        targets = [[codes[label] for label in group if label in codes] for group in there]
        label_codes = np.full((len(sources), max([1, *map(len, targets)])), -1, np.int32)
        for row, group in zip(label_codes, targets, strict=True):
            row[: len(group)] = group
        if len(sources) and (label_codes < 0).all():
            raise UserError(
                f"{reader.path}: the mapping of {name} leads from none of its labels (such as "
                f"{sources[0]!r}) to one of the classes (such as {classes[0]!r})"
            )
        tables.append(Table(name, reader, sources, label_codes, table_images))
    return Tables(tables, image_ids, classes)


def parse_inputs(inputs: Sequence[str]) -> tuple[list[epath.Path], list[str]]:
    """Paths and unique names of inputs given as `path` or `name=path`."""
    paths, names = [], []
    for text in inputs:
        match = None if epath.Path(text).exists() else _NAMED.fullmatch(text)
        paths.append(epath.Path(match[2] if match else text))
        names.append(match[1] if match else "")
    if not paths:
        raise UserError("--inputs: no tables, expected paths with commas between them")
    for place, path in enumerate(paths):
        if resolved(path) in map(resolved, paths[:place]):
            raise UserError(f"--inputs: {path} is given twice, expected different tables")
    parts = [[*path.parts[:-1], path.stem if path.suffix else path.name] for path in paths]
    short = ["/".join(p[-1:]) for p in parts]
    length = 1
    while len(set(short)) < len(short) and length < max(map(len, parts)):
        length += 1
        short = ["/".join(p[-length:]) for p in parts]
    names = [name or default for name, default in zip(names, short, strict=True)]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"--inputs: two tables are called {name!r}, expected name=path for one")
    return paths, names


def check_known(name: str, names: Sequence[str], field: str) -> int:
    """Place of a model among the inputs; a `UserError` names the known ones."""
    if name not in names:
        raise UserError(f"{field}: no input is called {name!r}, expected one of {', '.join(names)}")
    return list(names).index(name)


def _check_expanded(readers: Sequence[DetectionsReader]) -> None:
    first = readers[0]
    for reader in readers:
        if bool(reader.metadata.get("expanded")) != bool(first.metadata.get("expanded")):
            pair = [first, reader] if first.metadata.get("expanded") else [reader, first]
            raise UserError(
                f"{pair[1].path}: not expanded to parent classes, but {pair[0].path} is; expected "
                "all tables alike (expand the others: scripts.expand_detections)"
            )


def _common_images(
    readers: Sequence[DetectionsReader], coverage: str
) -> tuple[list[str], list[Int32[np.ndarray, " i"] | None]]:
    """Ids of the images, and for each table the image index of its images (None: the same)."""
    first = readers[0]
    others = [reader for reader in readers if reader.image_ids is not first.image_ids]
    if not others:
        return first.image_ids, [None] * len(readers)
    if coverage == "same":
        other = others[0]
        for one, two in ((first, other), (other, first)):
            missing = [image for image in one.image_ids if image not in two.image_codes]
            if missing:
                raise UserError(
                    f"{two.path}: covers {len(two.image_ids)} images, {one.path} "
                    f"{len(one.image_ids)}: {missing[0]!r} is missing in {two.path.name}; expected "
                    "the same images (--config.coverage=union or intersection takes both)"
                )
    sets = [reader.image_codes.keys() for reader in (first, *others)]
    chosen = set().union(*sets) if coverage == "union" else set(sets[0]).intersection(*sets[1:])
    if not chosen:
        raise UserError(
            f"{others[0].path}: covers none of the images of {first.path} (first ids: "
            f"{others[0].image_ids[0]!r} and {first.image_ids[0]!r})"
        )
    image_ids = sorted(chosen)
    codes = {image: code for code, image in enumerate(image_ids)}
    return image_ids, [
        np.array([codes.get(image, -1) for image in reader.image_ids], np.int32)
        for reader in readers
    ]


def _find_labels(reader: DetectionsReader) -> dict[str, tuple[epath.Path, int]]:
    """Labels of a table, each with the file and row where it comes first."""
    first_rows: dict[str, tuple[epath.Path, int]] = {}
    for file in reader.files:
        for label, row in file.labels().items():
            first_rows.setdefault(label, (file.path, row))
    return first_rows


def _common_labels(
    readers: Sequence[DetectionsReader],
    names: Sequence[str],
    label_rows: Sequence[Mapping[str, tuple[epath.Path, int]]],
    labels: Sequence[str] | None,
    mappings: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[str]:
    """The vocabulary; a `UserError` when a table uses another one."""
    own = [rows for name, rows in zip(names, label_rows, strict=True) if name not in mappings]
    if labels is not None:
        known = set(labels)
        for rows in own:
            foreign = {label: place for label, place in rows.items() if label not in known}
            if foreign:
                label, (path, row) = min(foreign.items(), key=lambda item: item[1][1])
                raise UserError(
                    f"{path}: row {row}: {label!r} is not among the {len(labels)} classes of the "
                    "dataset (a table of another vocabulary needs --config.mappings)"
                )
        return list(labels)
    for place, (reader, name) in enumerate(zip(readers, names, strict=True)):
        others = [
            rows
            for j, rows in enumerate(label_rows)
            if j != place and names[j] not in mappings and rows
        ]
        if name in mappings or not others or not label_rows[place]:
            continue
        shared = label_rows[place].keys() & set().union(*others)
        if not shared:
            mine, theirs = min(label_rows[place]), min(min(rows) for rows in others)
            raise UserError(
                f"{reader.path}: shares no label with the other tables ({mine!r} here, {theirs!r} "
                "there); a table of another vocabulary needs --config.mappings"
            )
    mapped = [
        mappings[name].get(label, ())
        for name, rows in zip(names, label_rows, strict=True)
        if name in mappings
        for label in rows
    ]
    vocabulary = sorted(set().union(*own, *mapped))
    if not vocabulary:
        raise UserError("config.mappings: lead from none of the tables' labels to any class")
    return vocabulary
