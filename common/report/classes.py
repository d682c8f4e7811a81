"""The table of classes, its groups by rarity, and what the page shows about one class.

Shape legend: K classes, R recalls, T tables.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from common.report import errors
from common.report.analysis import TableReport
from common.report.charts import table_class
from common.report.confusion import Confusions
from common.report.gains import RECALLS
from common.report.scope import Scope

TOP = 5  # confusions listed for a class
EDGES = (10, 100, 1000, 10_000, 100_000)  # training boxes; groups without classes are not shown


def rarity(scope: Scope) -> tuple[Float[np.ndarray, " K"], str]:
    """Boxes per class that say how rare it is, and where they are counted."""
    if scope.train_counts is None:
        return scope.counts, f"boxes in {scope.split}"
    return scope.train_counts, "training boxes"


def rarity_groups(scope: Scope) -> list[tuple[str, np.ndarray]]:
    """Name and classes (with truth) of each group by number of training boxes, rare ones first."""
    boxes, _ = rarity(scope)
    known = np.flatnonzero(scope.counts > 0)
    place = np.digitize(boxes[known], EDGES)
    lows, highs = (0, *EDGES), (*EDGES, None)
    groups = []
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if high is None:
            name = f"{low:,} and more"
        else:
            name = f"{low:,} to {high - 1:,}" if low else f"fewer than {high}"
        groups.append((name, known[place == number]))
    return [(name, members) for name, members in groups if len(members)]


def bar_cell(value: float, number: int = 0, scale: float = 1.0, digits: int = 3) -> str:
    """Table cell with a figure and a bar behind it; a dash for NaN."""
    if not np.isfinite(value):
        return '<td class="num" data-v="-1">–</td>'
    share = min(max(value / scale, 0.0), 1.0) if scale > 0 else 0.0
    return (
        f'<td class="num bar {table_class(number)}" data-v="{value:.6f}" '
        f'style="--share:{100 * share:.1f}%">{value:.{digits}f}</td>'
    )


def class_table(scope: Scope, tables: Sequence[TableReport]) -> str:
    """One row for each class with truth, by AP of the first table; the script sorts it."""
    boxes, where = rarity(scope)
    names, labels = scope.dataset.class_names, scope.dataset.class_labels
    heads = [sort_head("class", "text"), sort_head(where, "number")]
    if scope.train_counts is not None:
        heads.append(sort_head(f"boxes in {scope.split}", "number"))
    heads += [
        sort_head(f"AP {table.name}", "number", number, ascending=not number)
        for number, table in enumerate(tables)
    ]
    if len(tables) > 1:
        heads.append(sort_head("last − first" if len(tables) == 2 else "max − min", "number"))
    known = np.flatnonzero(scope.counts > 0)
    aps = np.stack([table.curves.aps for table in tables])
    rows = []
    for index in known[np.argsort(aps[0, known], kind="stable")]:
        cells = [
            f'<th scope="row" data-v="{escape(names[index], quote=True)}">'
            f'<button type="button" class="more" aria-expanded="false">{escape(names[index])}'
            f"</button> <code>{escape(labels[index])}</code></th>",
            f'<td class="num" data-v="{boxes[index]:.0f}">{boxes[index]:,.0f}</td>',
        ]
        if scope.train_counts is not None:
            count = scope.counts[index]
            cells.append(f'<td class="num" data-v="{count:.0f}">{count:,.0f}</td>')
        cells += [bar_cell(ap, number) for number, ap in enumerate(aps[:, index])]
        if len(tables) > 1:
            change = aps[-1, index] - aps[0, index]
            if len(tables) > 2:
                change = np.ptp(aps[:, index])
            sign = "up" if change > 0.0005 else "down" if change < -0.0005 else ""
            text = f"{change:+.3f}" if len(tables) == 2 else f"{change:.3f}"
            cells.append(f'<td class="num {sign}" data-v="{change:.6f}">{text}</td>')
        rows.append(f'<tr id="class-{index}" data-class="{index}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll tall"><table class="sortable" id="class-table"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def sort_head(text: str, kind: str, number: int | None = None, ascending: bool = False) -> str:
    """Column head whose button sorts by it."""
    key = "" if number is None else f'<i class="key {table_class(number)}"></i>'
    order = ' aria-sort="ascending"' if ascending else ""
    return (
        f'<th scope="col" data-kind="{kind}"{order}><button type="button">{key}{escape(text)}'
        '<span class="arrow" aria-hidden="true"></span></button></th>'
    )


def class_data(
    scope: Scope, tables: Sequence[TableReport], confusions: Confusions
) -> dict[str, Any]:
    """What the script shows when a class is opened."""
    by_actual = _top(confusions, confusions.actual, confusions.predicted)
    by_predicted = _top(confusions, confusions.predicted, confusions.actual)
    classes = {}
    for index in np.flatnonzero(scope.counts > 0).tolist():
        of_tables = []
        for number, table in enumerate(tables):
            counts = table.status_counts[index]
            found = int(table.found[index])
            wrong = int(counts[list(errors.ERRORS)].sum())
            precision = table.curves.precision[index]
            points = np.round(1000 * precision[: int(np.count_nonzero(precision))]).astype(int)
            of_tables.append(
                {
                    "ap": round(float(table.curves.aps[index]), 4),
                    "score": round(float(table.thresholds[index]), 3),
                    "found": found,
                    "wrong": wrong,
                    "errors": [int(counts[error]) for error in errors.ERRORS],
                    "curve": points.tolist(),
                    "takenFor": by_actual.get((number, index), []),
                    "reallyIs": by_predicted.get((number, index), []),
                }
            )
        classes[index] = {"truth": int(scope.counts[index]), "tables": of_tables}
    return {
        "recalls": RECALLS,
        "errors": [errors.STATUS_NAMES[error] for error in errors.ERRORS],
        "tables": [table.name for table in tables],
        "names": scope.dataset.class_names,
        "classes": classes,
    }


def _top(confusions: Confusions, one: np.ndarray, other: np.ndarray) -> dict:
    """(table, class) to its commonest counted partners [class, count], of the pairs of the page."""
    result: dict[tuple[int, int], list[list[int]]] = {}
    for number, counted in enumerate(confusions.counted):
        for pair in np.argsort(-counted, kind="stable"):
            if counted[pair]:
                listed = result.setdefault((number, int(one[pair])), [])
                if len(listed) < TOP:
                    listed.append([int(other[pair]), int(counted[pair])])
    return result


def embed_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
