"""The HTML page: everything in one file, nothing fetched.

It reads without its script; the script sorts, filters, opens classes and enlarges pictures.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from common.report import charts, drawing, errors, gallery
from common.report.analysis import TableReport
from common.report.classes import (
    bar_cell,
    class_data,
    class_table,
    embed_json,
    rarity,
    rarity_groups,
    sort_head,
)
from common.report.confusion import Confusions
from common.report.gains import SIZES
from common.report.pictures import Picture, image_f1
from common.report.scope import Scope

SECTIONS = (
    ("summary", "Summary"),
    ("breakdown", "Rarity and size"),
    ("errors", "Errors"),
    ("classes", "Classes"),
    ("confusions", "Confusions"),
    ("pictures", "Pictures"),
    ("method", "Method"),
)
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
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def build_page(
    scope: Scope,
    tables: Sequence[TableReport],
    confusions: Confusions,
    pictures: Sequence[Picture],
    shown: Sequence[Picture | None],
    min_score: float | None,
) -> str:
    """The whole page.

    Args:
      scope: images and truth.
      tables: at least one.
      confusions: of all tables.
      pictures: with their photos.
      shown: picture of each pair of `confusions`, or None.
      min_score: flag, None for the best score of each class.
    """
    name = str(scope.dataset.meta.get("name") or scope.dataset.directory.name)
    title = f"Detection report: {name}, {scope.split}"
    folder = Path(__file__).parent
    bodies = {
        "summary": _summary(scope, tables, min_score),
        "breakdown": _breakdown(scope, tables),
        "errors": _errors(tables),
        "classes": _classes(scope, tables),
        "confusions": _confusions(scope, tables, confusions, shown),
        "pictures": _pictures(scope, tables, confusions, pictures),
        "method": _method(scope, min_score),
    }
    links = "".join(f'<a href="#{key}">{text}</a>' for key, text in SECTIONS)
    sections = "".join(
        f'<section id="{key}"><h2>{text}</h2>{bodies[key]}</section>' for key, text in SECTIONS
    )
    boxes = f"{len(scope.images):,} images, {scope.counts.sum():,.0f} boxes to find"
    classes = f"{np.count_nonzero(scope.counts):,} classes with truth"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset(folder / 'style.css')}</style></head>"
        f'<body><a class="skip" href="#summary">Skip to content</a><header><h1>{escape(title)}</h1>'
        f"<p>{boxes} (copies for parent classes included), {classes}.</p></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{sections}</main>'
        '<dialog id="viewer" aria-label="Enlarged picture"></dialog>'
        f'<script type="application/json" id="data">'
        f"{embed_json(class_data(scope, tables, confusions))}</script>"
        f"<script>{_asset(folder / 'script.js')}</script></body></html>\n"
    )


def _asset(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _key(number: int, name: str) -> str:
    key = f'<i class="key {charts.table_class(number)}"></i>'
    return f'<span class="legend">{key}{escape(name)}</span>'


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(text: str, number: int | None = None, num: bool = True) -> str:
    key = "" if number is None else f'<i class="key {charts.table_class(number)}"></i>'
    style = ' class="num"' if num else ""
    return f'<th scope="col"{style}>{key}{escape(text)}</th>'


def _num(text: str) -> str:
    return f'<td class="num">{text}</td>'


def _summary(scope: Scope, tables: Sequence[TableReport], min_score: float | None) -> str:
    known = scope.counts > 0
    figures = ("mAP@0.5", "median AP", "classes at 0", "recall", "precision", "detections / image")
    heads = [_head("table", num=False), *map(_head, figures)]
    heads += [_head("parents added", num=False), _head("model", num=False)]
    rows = []
    for number, table in enumerate(tables):
        aps = table.curves.aps[known]
        found = int(table.image_found.sum())
        judged = found + int(table.image_wrong.sum())
        facts = [str(table.metadata[key]) for key in ("model", "step") if key in table.metadata]
        rows.append(
            f'<tr><th scope="row" title="{escape(str(table.path), quote=True)}">'
            f"{_key(number, table.name)}</th>{bar_cell(table.mean_ap, number, 1.0, 4)}"
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
        + f"<p>Recall and precision count detections {_judged_above(min_score)}.</p>"
        + notes
        + f'<p class="legends">{legend}</p><div class="charts"><figure><figcaption>Mean precision '
        f"over recall</figcaption>{charts.mean_curves(means)}</figure><figure><figcaption>AP of "
        f"each class over its {escape(where)}{left_out}</figcaption>{scatter}</figure></div>"
    )


def _breakdown(scope: Scope, tables: Sequence[TableReport]) -> str:
    _, where = rarity(scope)
    heads = [_head(f"mAP {table.name}", number) for number, table in enumerate(tables)]
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
    common = [_head("classes"), _head("boxes to find")]
    return (
        f'<div class="pair"><div><h3>By {escape(where)} of the class</h3>'
        + _table([_head(where, num=False), *common, *heads], rare)
        + "</div><div><h3>By size of the box</h3>"
        + _table([_head("side / image side", num=False), *common, *heads], sizes)
        + "</div></div>"
    )


def _errors(tables: Sequence[TableReport]) -> str:
    top = max(max(table.gains[name] for name in ERROR_TEXTS) for table in tables)
    heads = [_head("error", num=False), _head("what it is", num=False)]
    for number, table in enumerate(tables):
        heads += [_head(f"mAP it costs {table.name}", number), _head("how many")]
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
        return int(table.status_counts[:, list(errors.ERRORS)].sum())
    if name in ("missed", "false negatives"):
        return table.missed if name == "missed" else table.unfound
    return int(table.status_counts[:, errors.STATUS_NAMES.index(name)].sum())


def _classes(scope: Scope, tables: Sequence[TableReport]) -> str:
    return (
        '<p><label>Show classes with <input type="search" id="class-filter" '
        'placeholder="name or label" autocomplete="off"></label> <output id="class-count">'
        "</output> Choose a class for its curve, errors and confusions.</p>"
        + class_table(scope, tables)
    )


def _confusions(
    scope: Scope,
    tables: Sequence[TableReport],
    confusions: Confusions,
    shown: Sequence[Picture | None],
) -> str:
    if not len(confusions.predicted):
        return "<p>None above the scores.</p>"
    heads = [sort_head("detected as", "text"), sort_head("really is", "text")]
    for number, table in enumerate(tables):
        heads += [
            sort_head(f"wrong {table.name}", "number", number),
            sort_head("unverified", "number"),
        ]
    heads.append(_head("example", num=False))
    names = scope.dataset.class_names
    rows = []
    for pair, picture in enumerate(shown):
        predicted, actual = confusions.predicted[pair], confusions.actual[pair]
        child = scope.parents[predicted, actual]
        hint = ' <span class="hint">kind of it</span>' if child else ""
        cells = "".join(
            f'<td class="num" data-v="{count}">{count:,}</td>'
            for number in range(len(tables))
            for count in (confusions.counted[number, pair], confusions.unverified[number, pair])
        )
        link = ""
        if picture is not None:
            link = (
                f'<a class="example" href="#picture-{picture.image}" data-pair="{pair}">picture</a>'
            )
        rows.append(
            f'<tr><td data-v="{escape(names[predicted], quote=True)}">{escape(names[predicted])}'
            f'{hint}</td><td data-v="{escape(names[actual], quote=True)}">'
            f"{escape(names[actual])}</td>{cells}<td>{link}</td></tr>"
        )
    return (
        "<p>Detections on an object of another class, IoU at least 0.5. <em>Wrong</em>: the metric "
        "counts it as such. <em>Unverified</em>: nobody checked whether the detected class is in "
        "the image, the metric leaves it out.</p>"
        f'<div class="scroll tall"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pictures(
    scope: Scope,
    tables: Sequence[TableReport],
    confusions: Confusions,
    pictures: Sequence[Picture],
) -> str:
    if not pictures:
        return "<p>None asked for.</p>"
    pairs = {
        (int(predicted), int(actual)): number
        for number, (predicted, actual) in enumerate(
            zip(confusions.predicted, confusions.actual, strict=True)
        )
    }
    scores = [image_f1(scope, table) for table in tables]
    limit = drawing.boxes_per_picture(len(pictures), len(tables))
    figures = [
        gallery.figure(scope, tables, scores, confusions, picture, pairs, limit)
        for picture in pictures
    ]
    return gallery.controls([table.name for table in tables]) + (
        f'<div class="gallery" id="gallery">{"".join(figures)}</div>'
    )


def _judged_above(min_score: float | None) -> str:
    if min_score is not None:
        return f"above a score of {min_score:g}"
    return "above the score at which their class has its best F1"


def _method(scope: Scope, min_score: float | None) -> str:
    _, where = rarity(scope)
    if scope.train_split is None:
        rare = f"Rarity counts the {escape(where)}: the dataset has no training split."
    else:
        rare = f"Training boxes are those of the split {escape(scope.train_split)}."
    return (
        "<ul><li>AP and mAP are those of the OpenImages Challenge 2019 metric at IoU 0.5, the same "
        "numbers that <code>scripts.score</code> prints: truth copied to parent classes, "
        "detections of classes that nobody verified in the image left out, group-of boxes count "
        "once and absorb what lies inside.</li>"
        f"<li>Counts, confusions and pictures take detections {_judged_above(min_score)}; "
        "AP, curves and the cost of errors take all detections. A class without a correct "
        "detection has the score of the best F1 of all classes together.</li>"
        "<li>A wrong detection gets the first kind that fits: duplicate (IoU ≥ 0.5 with an object "
        "of its class that another took), class (IoU ≥ 0.5 with an object of another class), "
        "localisation (0.1 ≤ IoU &lt; 0.5, its class), both (0.1 ≤ IoU &lt; 0.5, another class), "
        "background. Kinds and repairs follow TIDE (Bolya et al., 2020), which looks for "
        "localisation first and for duplicates last. Repaired class and localisation errors "
        "become correct where nothing else found their object; other wrong detections go away; "
        "missed objects go away, and a class with nothing left to find counts 1. Gains do not add "
        "up.</li>"
        "<li>Size is the square root of the share of the image that a box covers. As in COCO, "
        "objects of other sizes are left out with the detections that found them, and of the wrong "
        "detections those of this size count.</li>"
        f"<li>{rare} Boxes of child classes are included.</li>"
        "<li>The F1 of an image is 2 found / (2 found + wrong + not found). Worst: lowest F1, then "
        "most errors. Best: highest F1, then most objects.</li></ul>"
    )
