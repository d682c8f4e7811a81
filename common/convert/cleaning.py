"""Cleaning of boxes and labels, and the checks that catch the classic mix-ups of a whole set.

Shape legend: M boxes (any order); boxes are xmin, ymin, xmax, ymax, normalised.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt64

from common.convert.report import DROPPED, EXAMPLES, REPAIRED, Report
from common.io.errors import UserError

# Annotations are rounded (COCO to 0.01 pixel, OpenImages to 1e-6): boxes that reach outside the
# photo by no more than this are clipped and not reported.
_ROUNDING = 1e-3
# Checks of a whole set need at least so many boxes.
_MIN_BOXES = 10


def clean_boxes(
    table: dict[str, np.ndarray], files: list[str], report: Report
) -> dict[str, np.ndarray]:
    """Drops boxes that mean nothing, clips those that reach outside the photo, drops duplicates.

    Args:
      table: box columns (annotations.BOX_COLUMNS, mask columns allowed).
      files: names that column `file` refers to.
      report: gets every dropped or repaired row.

    Returns:
      The table with the remaining rows, in their order.
    """
    box = table["box"]

    def note(rows: np.ndarray, reason: str, action: str) -> None:
        where = np.flatnonzero(rows)
        few = where[:EXAMPLES]
        names = [files[i] for i in table["file"][few]]
        found = ["box " + " ".join(f"{x:.6g}" for x in table["box"][i]) for i in few]
        report.add(reason, action, names, table["row"][where], found)

    finite = np.isfinite(box).all(1)
    note(~finite, "number missing or not finite", DROPPED)
    known = finite & (table["class"] >= 0)
    note(finite & ~known, "unknown class", DROPPED)
    with np.errstate(invalid="ignore"):
        has_area = known & (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        note(known & ~has_area, "zero area", DROPPED)
        inside = (box[:, 2] > 0) & (box[:, 3] > 0) & (box[:, 0] < 1) & (box[:, 1] < 1)
        note(has_area & ~inside, "outside the frame", DROPPED)
        keep = has_area & inside
        reach = keep & ((box < -_ROUNDING).any(1) | (box > 1 + _ROUNDING).any(1))
        note(reach, "reaches outside the frame", REPAIRED)
        del finite, known, has_area, inside
        # The metrics of COCO and LVIS, whose sets have areas, compare with the box as it was.
        if "area" in table and (reach & keep).any():
            table["whole_box"] = box.copy()
        np.clip(box, 0, 1, out=box)
        # A box whose part inside the frame is thinner than float32 can tell is empty once clipped.
        del reach
        flat = keep & ~((box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1]))
    note(flat, "outside the frame", DROPPED)
    keep &= ~flat
    again = keep.copy()
    again[keep] = _repeated(table, keep)
    note(again, "duplicate row", DROPPED)
    keep &= ~again
    if keep.all():
        return table
    return {name: column[keep] for name, column in table.items()}


def clean_labels(
    table: dict[str, np.ndarray], files: list[str], report: Report
) -> dict[str, np.ndarray]:
    """Drops image-level labels of unknown classes and repeated ones; columns as LABEL_COLUMNS."""

    def note(rows: np.ndarray, reason: str) -> None:
        where = np.flatnonzero(rows)
        names = [files[i] for i in table["file"][where[:EXAMPLES]]]
        report.add(reason, DROPPED, names, table["row"][where])

    known = table["class"] >= 0
    note(~known, "image label of unknown class")
    key = table["image"].astype(np.uint64) << np.uint64(32)
    key |= table["class"].astype(np.uint32).astype(np.uint64) << np.uint64(2)
    key |= table["confidence"].astype(np.uint64)
    again = _seen_before(key) & known
    note(again, "duplicate image label")
    keep = known & ~again
    if keep.all():
        return table
    return {name: column[keep] for name, column in table.items()}


def check_layout(boxes: Float[np.ndarray, "M 4"], where: str, columns: str) -> None:
    """Catches pixels for fractions and widths for corners.

    Args:
      boxes: as read, before cleaning, supposed to be normalised corners.
      where: the file, for the message.
      columns: names of the four columns, for the message.

    Raises:
      UserError: says what the coordinates look like.
    """
    boxes = boxes[np.isfinite(boxes).all(1)]
    if len(boxes) < _MIN_BOXES:
        return
    large = float((np.abs(boxes) > 1.5).any(1).mean())
    if large > 0.5:
        raise UserError(
            f"{where}: {columns} look like pixels ({large:.0%} of the boxes exceed 1.5, "
            f"the largest is {boxes.max():.6g}); expected fractions of width and height in [0, 1]"
        )
    inverted = float(((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])).mean())
    if inverted > 0.2:
        raise UserError(
            f"{where}: in {inverted:.0%} of the boxes a maximum is not above its minimum; "
            f"{columns} look like x, y, width, height or swapped columns; expected corners"
        )


def check_pixels(
    boxes: Float[np.ndarray, "M 4"],
    height_width: Float[np.ndarray, "M 2"],
    where: str,
    *,
    corners: bool,
) -> None:
    """Catches fractions for pixels, corners for widths (or the reverse) and sizes of other photos.

    Args:
      boxes: as read, supposed to be pixels: x, y, width, height as in COCO, or corners as in VOC.
      height_width: size of the photo of each box in pixels.
      where: the file or folder, for the message.
      corners: which of the two is expected.

    Raises:
      UserError: says what the numbers look like.
    """
    good = np.isfinite(boxes).all(1) & (height_width > 2).all(1)
    boxes, limit = boxes[good], height_width[good][:, ::-1] * 1.01 + 1  # width, height
    if len(boxes) < _MIN_BOXES:
        return
    forms = ("x, y, width, height", "xmin, ymin, xmax, ymax")
    expected = f"expected {forms[corners]} in pixels"
    fractions = float((boxes <= 1.5).all(1).mean())
    if fractions > 0.9:
        raise UserError(
            f"{where}: boxes look normalised (no value above 1.5 in {fractions:.0%} of them); "
            f"{expected}"
        )
    inverted = float((boxes[:, 2:] <= boxes[:, :2]).any(1).mean())
    if corners and inverted > 0.2:
        raise UserError(
            f"{where}: in {inverted:.0%} of the boxes a maximum is not above its minimum: "
            f"they look like {forms[0]}; {expected}"
        )
    far = boxes[:, 2:] if corners else boxes[:, :2] + boxes[:, 2:]
    over = float((far > limit).any(1).mean())
    like_corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= limit).all(1)
    if not corners and over > 0.2 and like_corners.mean() > 0.95:
        raise UserError(
            f"{where}: boxes look like {forms[1]} ({over:.0%} of them leave the photo when read as "
            f"{forms[0]}); {expected}"
        )
    if over > 0.5:
        raise UserError(
            f"{where}: {over:.0%} of the boxes leave their photo; are width and height those of "
            "the photos on which the boxes were drawn?"
        )


def check_class_ids(used: Sequence[str], known: Sequence[str], where: str) -> None:
    """Catches class ids that are off by one, and ids none of which is known.

    Args:
      used: ids of the boxes.
      known: ids of the class list.
      where: the file, for the message.

    Raises:
      UserError: some ids are unknown, and all would be known one higher or lower; or all are.
    """
    unknown = [i for i in used if i not in set(known)]
    if not unknown or not known:
        return
    categories = f"the categories {known[0]}..{known[-1]}"
    if all(re.fullmatch(r"-?[0-9]{1,18}", i) for i in (*used, *known)):
        numbers = set(map(int, known))
        for shift in (1, -1):
            if all(int(i) + shift in numbers for i in used):
                raise UserError(
                    f"{where}: category ids look off by one: {', '.join(unknown[:3])} not among "
                    f"{categories}, but every id {shift:+d} is"
                )
    if len(unknown) == len(used):
        raise UserError(
            f"{where}: none of the category ids ({', '.join(unknown[:3])} ...) is among "
            f"{categories}"
        )


def _repeated(table: dict[str, np.ndarray], rows: Bool[np.ndarray, " M"]) -> Bool[np.ndarray, " m"]:
    """True for each selected row whose image, class, box, flags and mask occurred before."""
    key = _mix(np.zeros(int(rows.sum()), np.uint64), table["image"][rows].view(np.uint32))
    key = _mix(key, table["class"][rows].view(np.uint32))
    key = _mix(key, table["flags"][rows])
    bits = (table["box"][rows] + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0
    for column in range(4):
        key = _mix(key, bits[:, column])
    if "mask_check" in table:
        key = _mix(key, table["mask_check"][rows])
    return _seen_before(key)


def _mix(key: UInt64[np.ndarray, " m"], value: np.ndarray) -> UInt64[np.ndarray, " m"]:
    """One round of a 64-bit hash (a bijection of the key for each value), in place."""
    key ^= value
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
    return key


def _seen_before(key: UInt64[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    seen = np.zeros(len(key), bool)
    seen[order[1:]] = ordered[1:] == ordered[:-1]
    return seen
