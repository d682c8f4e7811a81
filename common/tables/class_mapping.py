"""Mappings between vocabularies: CSV tables with one column a vocabulary.

    oid_mid,oid_name,coco_name,objects365_name
    /m/01_5g,Chopsticks,,Chopsticks
    /m/0k4j,Car,car,Car

Any two columns make a mapping; a row that is empty in one of them says nothing about it. Several
source labels may mean one target label. Where one source label has several target labels, a rule
decides: 'error' refuses, 'first' takes the first row, 'all' takes each.

Maps between COCO, LVIS, Objects365 and OpenImages, in either direction, are shipped by name, but
for one pair: LVIS and Objects365 (class_maps/README.md).
"""

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.io.errors import UserError
from common.io.paths import local_copy
from common.tables import Detections

RULES = ("error", "first", "all")
SHIPPED = Path(__file__).parent / "class_maps"
# Each with the vocabularies that its table, such as class_maps/lvis.csv, has columns of.
SHIPPED_PAIRS = {
    "coco": ("openimages",),
    "lvis": ("coco", "openimages"),
    "objects365": ("coco", "openimages"),
}


@dataclasses.dataclass(frozen=True)
class ClassMapping:
    """What the labels of a source vocabulary are called in a target vocabulary.

    Attributes:
      targets: source label to one or several target labels, in file order.
    """

    targets: Mapping[str, Sequence[str]]

    @property
    def target_labels(self) -> list[str]:
        """All labels that can come out, each once."""
        return list(dict.fromkeys(label for group in self.targets.values() for label in group))

    def table(
        self, labels: Sequence[str], target_labels: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mapping between two lists as flat arrays.

        Args:
          labels: source labels; those that the mapping does not have get no target.
          target_labels: where the targets are looked up; all must be there.

        Returns:
          starts, counts: of each of `labels`, rows of the third array.
          indices: into `target_labels`.
        """
        place = {label: index for index, label in enumerate(target_labels)}
        groups = [[place[t] for t in self.targets.get(label, ())] for label in labels]
        counts = np.array([len(group) for group in groups], np.int64)
        indices = np.array([index for group in groups for index in group], np.int64)
        return np.cumsum(counts) - counts, counts, indices


def find_class_mapping(
    text: str, *, rule: str = "error", where: Mapping[str, str] | None = None
) -> ClassMapping:
    """Reads a class map that a user names.

    Args:
      text: name of a shipped map, SOURCE_to_TARGET such as coco_to_openimages (a pair of
        SHIPPED_PAIRS, in either direction), or FILE:SOURCE_COLUMN:TARGET_COLUMN; either may end
        with :RULE.
      rule: where the text has none.
      where: as in `read_class_mapping`.

    Raises:
      UserError: no such map, or as `read_class_mapping`.
    """
    body, _, last = text.rpartition(":")
    if body and last in RULES:
        text, rule = body, last
    if text.count(":") >= 2:
        return read_class_mapping(*text.rsplit(":", 2), rule=rule, where=where)
    source, _, target = text.partition("_to_")
    for table, others in SHIPPED_PAIRS.items():
        if (source == table and target in others) or (target == table and source in others):
            path = SHIPPED / f"{table}.csv"
            return read_class_mapping(path, source, target, rule=rule, where=where)
    pairs = ", ".join(f"{a}_to_{b}" for a, others in SHIPPED_PAIRS.items() for b in others)
    raise UserError(
        f"class map {text!r}: expected FILE:SOURCE_COLUMN:TARGET_COLUMN or one of {pairs}, or one "
        "of these the other way round"
    )


def read_class_mapping(
    path: str | os.PathLike,
    source_column: str,
    target_column: str,
    *,
    rule: str = "error",
    where: Mapping[str, str] | None = None,
) -> ClassMapping:
    """Reads two columns of a CSV file.

    Args:
      path: file with a header.
      source_column: name of the column with the labels to rename.
      target_column: name of the column with the new labels.
      rule: for a source label with several targets: 'error', 'first' or 'all'.
      where: further column names and the value that they must have for a row to count.

    Raises:
      UserError: no such file or column, a row of another length, a source label with several
        targets (rule 'error'), or no row that has both labels.
    """
    if rule not in RULES:
        raise UserError(f"rule {rule!r}: expected one of {', '.join(RULES)}")
    where = dict(where or {})
    try:
        with local_copy(path) as local, open(local, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            for name in (source_column, target_column, *where):
                if name not in header:
                    raise UserError(
                        f"{path}: no column {name!r}, found {', '.join(header) or 'an empty file'}"
                    )
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot read the class mapping ({error})") from error
    targets: dict[str, list[str]] = {}
    first_line: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{path}: line {line}: {len(row)} fields, expected {len(header)} as in the header"
            )
        fields = {name: value.strip() for name, value in zip(header, row, strict=True)}
        source, target = fields[source_column], fields[target_column]
        if not source or not target or any(fields[k] != v for k, v in where.items()):
            continue
        known = targets.setdefault(source, [])
        if target in known or (known and rule == "first"):
            continue
        if known and rule == "error":
            raise UserError(
                f"{path}: line {line}: {source_column} {source!r} is mapped to {target!r}, and to "
                f"{known[0]!r} in line {first_line[source]}: choose the rule 'first' or 'all'"
            )
        known.append(target)
        first_line.setdefault(source, line)
    if not targets:
        condition = "".join(f" and {k} = {v!r}" for k, v in where.items())
        raise UserError(f"{path}: no row with {source_column} and {target_column}{condition}")
    return ClassMapping(targets)


def map_detections(
    detections: Detections, mapping: ClassMapping, target_labels: Sequence[str]
) -> Detections:
    """Renames the labels; rows whose label has no target are left out.

    Args:
      detections: rows in table order.
      mapping: from their labels.
      target_labels: what the new `label_index` points into; holds all targets of the mapping.

    Returns:
      The rows in table order; the copies of a row with several targets follow each other.
    """
    starts, counts, indices = mapping.table(detections.labels, target_labels)
    repeats = counts[detections.label_index]
    rows = np.repeat(np.arange(len(detections)), repeats)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    labels = indices[starts[detections.label_index[rows]] + within]
    taken = detections.take(rows)
    return dataclasses.replace(
        taken, labels=list(target_labels), label_index=labels.astype(np.int32)
    )
