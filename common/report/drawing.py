"""Boxes of truth and detections over a photo, as SVG.

Every box is one path of class `box` and its status, with a tooltip; texts are drawn above them. The
page's style sheet gives the colours, and hides what the reader switches off.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from common.data.dataset import GROUP_OF
from common.report import errors
from common.report.analysis import TableReport
from common.report.pictures import Picture
from common.report.scope import Scope

MAX_DRAWN = 30_000  # detections on the page
MAX_BOXES = 40  # detections on a picture
LETTER = 7.6  # pixels of a letter, about
HIDDEN = (errors.ABSORBED,)  # inside group-of boxes, where they are right but tell nothing


def draw(scope: Scope, table: TableReport, picture: Picture, pairs: dict, limit: int) -> str:
    """SVG elements of one table on one picture.

    Args:
      scope: the truth.
      table: the detections.
      picture: what to draw on.
      pairs: (predicted, actual) classes of the confusions on the page to their number.
      limit: detections drawn, the best-scored ones.
    """
    names = scope.dataset.class_names
    size = np.array([picture.width, picture.height] * 2)
    first, last = scope.dataset.box_offsets[picture.image : picture.image + 2]
    parts, texts = [], []
    is_found = np.isin(np.arange(first, last), table.found_rows)
    boxes, classes, flags = scope.dataset.image_boxes(picture.image)
    for box, index, flag, hit in zip(boxes, classes, flags, is_found, strict=True):
        name = names[index] + (" (group)" if flag & GROUP_OF else "")
        status = "found" if hit else "missed"
        parts.append(box_path(box * size, status, f"truth: {name}, {status}"))
        if not hit:
            texts.append(box_text(box * size, status, f"missed {name}", picture))
    for row in drawn_rows(scope, table, picture.image, limit):
        status, score = table.judged.status[row], table.judged.scores[row]
        index, target = int(table.judged.classes[row]), int(table.judged.targets[row])
        text = f"{names[index]} {score:.2f}"
        attributes = ""
        if target >= 0 and status in (errors.CLASS, errors.UNVERIFIED):
            actual = int(scope.dataset.box_classes[target])
            text += f", is {names[actual]}"
            if (index, actual) in pairs:
                attributes = f' data-pair="{pairs[index, actual]}"'
        status = errors.STATUS_NAMES[status]
        box = np.clip(table.judged.boxes[row], 0, 1) * size
        title = text if status == "class" else f"{text}, {status}"
        parts.append(box_path(box, status, title, attributes))
        texts.append(box_text(box, status, text, picture, attributes))
    return "".join(parts + texts)


def drawn_rows(scope: Scope, table: TableReport, image: int, limit: int) -> Sequence[int]:
    """Judged detections to draw, best score first; copies for parent classes are left out."""
    rows = np.flatnonzero(table.judged.images == image)
    rows = rows[np.isin(table.judged.status[rows], HIDDEN, invert=True)]
    rows = rows[np.lexsort((table.judged.status[rows], -table.judged.scores[rows]))]
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        key = (*table.judged.boxes[row].tolist(), float(table.judged.scores[row]))
        groups.setdefault(key, []).append(int(row))
    kept = []
    for group in groups.values():
        classes = [int(table.judged.classes[row]) for row in group]
        inherited = np.any(scope.parents[classes], axis=0)
        kept += [row for row, index in zip(group, classes, strict=True) if not inherited[index]]
    return kept[:limit]


def boxes_per_picture(num_pictures: int, num_tables: int) -> int:
    return max(8, min(MAX_BOXES, MAX_DRAWN // max(num_pictures * num_tables, 1)))


def box_path(box: np.ndarray, status: str, title: str, attributes: str = "") -> str:
    """A box in pixels as a path; `status` is a class of the style sheet, `title` its tooltip."""
    x0, y0, x1, y1 = (f"{value:.0f}" for value in box)
    return (
        f'<path class="box {status}"{attributes} d="M{x0} {y0}H{x1}V{y1}H{x0}Z">'
        f"<title>{escape(title)}</title></path>"
    )


def box_text(
    box: np.ndarray, status: str, text: str, picture: Picture, attributes: str = ""
) -> str:
    x = max(min(box[0] + 3, picture.width - LETTER * len(text)), 2)
    y = box[1] - 4 if status != "missed" and box[1] > 16 else box[1] + 15
    return (
        f'<text class="box-text {status}"{attributes} x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'
    )
