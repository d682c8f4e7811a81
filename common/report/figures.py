"""Sections of figures: the summary, mAP by rarity and size, and what errors cost."""

from collections.abc import Sequence
from html import escape

import numpy as np

from common.report import charts
from common.report import errors as kinds
from common.report.analysis import TableReport
from common.report.classes import bar_cell, rarity, rarity_groups
from common.report.gains import SIZES
from common.report.scope import Scope

ERROR_TEXTS = {
    "class": "right place, class of another kind",
    "localisation": "right class, IoU 0.1 to 0.5",
    "both": "wrong class and IoU 0.1 to 0.5",
    "duplicate": "object already found by a better-scored one",
    "background": "nothing there (IoU under 0.1)",
    "missed": "objects found by nothing, nor nearly",
    "false positives": "all wrong detections together",
    "false negatives": "all objects not found together",
}


def _key(number: int, name: str) -> str:
    key = f'<i class="key {charts.table_class(number)}"></i>'
    return f'<span class="legend">{key}{escape(name)}</span>'


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def head(text: str, number: int | None = None, num: bool = True) -> str:
    key = "" if number is None else f'<i class="key {charts.table_class(number)}"></i>'
    style = ' class="num"' if num else ""
    return f'<th scope="col"{style}>{key}{escape(text)}</th>'


def _num(text: str) -> str:
    return f'<td class="num">{text}</td>'


def summary(scope: Scope, tables: Sequence[TableReport], min_score: float | None) -> str:
    known = scope.counts > 0
    official = tuple(tables[0].official)
    figures = (*official, "median AP", "classes at 0", "recall", "precision", "detections / image")
    heads = [head("table", num=False), *map(head, figures)]
    heads += [head("parents added", num=False), head("model", num=False)]
    rows = []
    for number, table in enumerate(tables):
        aps = table.curves.aps[known]
        found = int(table.image_found.sum())
        judged = found + int(table.image_wrong.sum())
        facts = [str(table.metadata[key]) for key in ("model", "step") if key in table.metadata]
        rows.append(
            f'<tr><th scope="row" title="{escape(str(table.path), quote=True)}">'
            f"{_key(number, table.name)}</th>"
            + "".join(bar_cell(table.official[name], number, 1.0, 4) for name in official)
            + _num(f"{np.median(aps):.3f}")
            + _num(f"{np.count_nonzero(aps == 0):,}")
            + _num(f"{found / scope.counts.sum():.3f}")
            + _num(f"{found / judged:.3f}" if judged else "–")
            + _num(f"{table.num_rows / len(scope.images):,.1f}")
            + f"<td>{'yes' if table.expanded else 'no'}</td>"
            + f"<td>{escape(', step '.join(facts))}</td></tr>"
        )
    notes = ""
    inner = np.count_nonzero(scope.parents.any(0) & known)
    plain = [table.name for table in tables if not table.expanded]
    if inner and plain:
        notes = (
            f'<p class="note">{escape(", ".join(plain))}: detections are not copied to parent '
            f"classes, so the {inner:,} parent classes have only their own. The official metric "
            "expects the copies: <code>--expand_predictions</code>.</p>"
        )
    means = [np.nanmean(table.curves.precision, axis=0) for table in tables]
    boxes, where = rarity(scope)
    legend = "".join(_key(number, table.name) for number, table in enumerate(tables))
    scatter = charts.rarity_scatter(
        boxes, [table.curves.aps for table in tables], scope.dataset.class_names, where
    )
    left_out = (
        f" (first {charts.MAX_SCATTERED} tables)" if len(tables) > charts.MAX_SCATTERED else ""
    )
    return (
        _table(heads, rows)
        + f"<p>Recall and precision count detections {judged_above(min_score)}.</p>"
        + notes
        + f'<p class="legends">{legend}</p><div class="charts"><figure><figcaption>Mean precision '
        f"over recall</figcaption>{charts.mean_curves(means)}</figure><figure><figcaption>AP of "
        f"each class over its {escape(where)}{left_out}</figcaption>{scatter}</figure></div>"
    )


def breakdown(scope: Scope, tables: Sequence[TableReport]) -> str:
    _, where = rarity(scope)
    heads = [head(f"mAP {table.name}", number) for number, table in enumerate(tables)]
    rare = [
        f'<tr><th scope="row">{name}</th>{_num(f"{len(members):,}")}'
        f"{_num(f'{scope.counts[members].sum():,.0f}')}"
        + "".join(
            bar_cell(float(np.mean(table.curves.aps[members])), number)
            for number, table in enumerate(tables)
        )
        + "</tr>"
        for name, members in rarity_groups(scope)
    ]
    sizes = [
        f'<tr><th scope="row">{name}</th>{_num(f"{np.count_nonzero(counts):,}")}'
        f"{_num(f'{counts.sum():,.0f}')}"
        + "".join(
            bar_cell(float(table.size_aps[size]), number) for number, table in enumerate(tables)
        )
        + "</tr>"
        for size, (name, counts) in enumerate(zip(SIZES, scope.size_counts, strict=True))
    ]
    common = [head("classes"), head("boxes to find")]
    return (
        f'<div class="pair"><div><h3>By {escape(where)} of the class</h3>'
        + _table([head(where, num=False), *common, *heads], rare)
        + "</div><div><h3>By size of the box</h3>"
        + _table([head("side / image side", num=False), *common, *heads], sizes)
        + "</div></div>"
    )


def errors(tables: Sequence[TableReport]) -> str:
    top = max(max(table.gains[name] for name in ERROR_TEXTS) for table in tables)
    heads = [head("error", num=False), head("what it is", num=False)]
    for number, table in enumerate(tables):
        heads += [head(f"mAP it costs {table.name}", number), head("how many")]
    rows = []
    for name, text in ERROR_TEXTS.items():
        cells = ""
        for number, table in enumerate(tables):
            cells += bar_cell(table.gains[name], number, top) + _num(f"{_count(table, name):,}")
        total = ' class="total"' if name.startswith("false") else ""
        rows.append(f'<tr{total}><th scope="row">{name}</th><td>{text}</td>{cells}</tr>')
    return (
        "<p>What each kind of error costs: how much higher mAP would be with it repaired, over "
        "all detections; and how many there are above the scores at which the table is "
        "judged.</p>" + _table(heads, rows)
    )


def _count(table: TableReport, name: str) -> int:
    if name == "false positives":
        return int(table.status_counts[:, list(kinds.ERRORS)].sum())
    if name in ("missed", "false negatives"):
        return table.missed if name == "missed" else table.unfound
    return int(table.status_counts[:, kinds.STATUS_NAMES.index(name)].sum())


def judged_above(min_score: float | None) -> str:
    if min_score is not None:
        return f"above a score of {min_score:g}"
    return "above the score at which their class has its best F1"
