"""Boxes out of instance masks for classes that are mostly boxed as groups (paper section 5.9).

The detection files of OpenImages have grapes, for one, as boxes of groups; the masks of the
segmentation files outline single ones. The boxes of such masks join the others; those that the
detection files have already stay as they are.

Shape legend: M boxes, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64

from common.convert.annotations import BOX_COLUMNS, Annotations, Columns
from common.convert.openimages_masks import box_order, mask_rows
from common.convert.report import NOTED, Report
from common.data.dataset import GROUP_OF
from common.io.errors import UserError


def add_instance_boxes(
    annotations: Annotations, mask_files: Sequence[Path], wanted: Sequence[str], report: Report
) -> None:
    """Adds the boxes of masks that have none, of some classes.

    Args:
      annotations: boxes are added in place; the classes are listed on the screen and in
        dataset.json, `boxes_from_masks`.
      mask_files: CSV files of `openimages_masks.attach`.
      wanted: labels or names of classes; or one number, the least share of group-of boxes of the
        classes to take.
      report: gets the boxes that were added.

    Raises:
      UserError: an unknown class, a share outside 0 to 1, no masks of a class.
    """
    group_of, counts = _group_of(annotations)
    share = _share(wanted)
    chosen = (
        _named(annotations, wanted)
        if share is None
        else np.flatnonzero((counts > 0) & (group_of >= share * counts))
    )
    class_index = {label: i for i, label in enumerate(annotations.class_labels)}
    columns, added = Columns(BOX_COLUMNS), np.zeros(len(counts), np.int64)
    order = box_order(annotations)
    for path in mask_files:
        for line, rows in mask_rows(path, annotations, order, class_index):
            new = np.flatnonzero(
                (rows.match < 0) & (rows.image >= 0) & np.isin(rows.class_, chosen)
            )
            report.add("box from an instance mask", NOTED, str(path), new + line)
            columns.append(
                **{"image": rows.image[new], "class": rows.class_[new], "box": rows.box[new]},
                flags=np.zeros(len(new)),
                file=np.full(len(new), len(annotations.files)),
                row=new + line,
            )
            added += np.bincount(rows.class_[new], minlength=len(counts))
        annotations.files.append(str(path))
    missing = chosen[added[chosen] == 0]
    if share is None and len(missing):
        raise UserError(
            f"--boxes_from_masks: found no instance mask without a box of "
            f"{annotations.class_names[missing[0]]!r}, expected some in "
            f"{', '.join(map(str, mask_files)) or 'a file of masks beside the boxes'}"
        )
    taken = columns.take()
    for name in annotations.boxes:
        annotations.boxes[name] = np.concatenate([annotations.boxes[name], taken[name]])
    listed = [int(i) for i in chosen if added[i]]
    for i in listed:
        print(
            f"boxes from masks: {added[i]:,} of {annotations.class_names[i]}, of whose "
            f"{counts[i]:,} boxes {group_of[i]:,} are of groups",
            flush=True,
        )
    if not listed:
        least = f"{share or 0:.0%}"
        print(f"boxes from masks: none; no class has {least} of its boxes as groups, and masks")
    labels = annotations.class_labels
    annotations.extra["boxes_from_masks"] = {labels[i]: int(added[i]) for i in listed}


def _group_of(annotations: Annotations) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
    """Group-of boxes and all boxes of each class."""
    table, count = annotations.boxes, len(annotations.class_labels)
    known = table["class"] >= 0
    classes, flags = table["class"][known], table["flags"][known]
    groups = np.bincount(classes[flags & GROUP_OF > 0], minlength=count)
    return groups, np.bincount(classes, minlength=count)


def _share(wanted: Sequence[str]) -> float | None:
    """The number, if it is one."""
    try:
        (text,) = wanted
        share = float(text)
    except ValueError:
        return None
    if not 0 < share <= 1:
        raise UserError(f"--boxes_from_masks={text}: expected a share above 0, at most 1")
    return share


def _named(annotations: Annotations, wanted: Sequence[str]) -> Int[np.ndarray, " n"]:
    labels = annotations.class_labels
    names = [name.lower() for name in annotations.class_names]
    places = []
    for text in wanted:
        found = [i for i, label in enumerate(labels) if label == text]
        found = found or [i for i, name in enumerate(names) if name == text.lower()]
        if len(found) != 1:
            what = f"{len(found)} classes of that name" if found else "no such class"
            raise UserError(
                f"--boxes_from_masks: found {what}, {text!r}, expected labels or names such as "
                f"{labels[0]!r} or {annotations.class_names[0]!r}, or a share such as 0.5"
            )
        places.append(found[0])
    return np.array(places, np.int64)
