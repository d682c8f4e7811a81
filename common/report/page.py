"""The page about detections tables; its script filters and opens classes and enlarges pictures."""

from collections.abc import Sequence
from html import escape

import numpy as np

from common.report import drawing, figures, gallery
from common.report.analysis import TableReport
from common.report.classes import class_data, class_table, embed_json, rarity, sort_head
from common.report.confusion import Confusions
from common.report.frame import html_page
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
_METRIC = {
    "openimages": "AP and mAP are those of the OpenImages Challenge 2019 metric at IoU 0.5, the "
    "same numbers that <code>scripts.score</code> prints: truth copied to parent classes, "
    "detections of classes that nobody verified in the image left out (none, where the dataset is "
    "annotated exhaustively), group-of boxes count once and absorb what lies inside.",
    "coco": "The figures of the summary are those of <code>scripts.score --metric=coco</code>. All "
    "else looks at IoU 0.5: every class is judged in every image, crowds absorb what lies inside "
    "and count nothing. AP of a class and by size are areas under the whole curve, which COCO "
    "reads at 101 places: they differ a little from its AP50.",
    "lvis": "The figures of the summary are those of <code>scripts.score --metric=lvis</code>. All "
    "else looks at IoU 0.5: classes that were verified in the image are judged, and where not "
    "every object of a class has a box, detections that find none count nothing. AP of a class "
    "and by size are areas under the whole curve.",
}


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
    bodies = {
        "summary": figures.summary(scope, tables, min_score),
        "breakdown": figures.breakdown(scope, tables),
        "errors": figures.errors(tables),
        "classes": _classes(scope, tables),
        "confusions": _confusions(scope, tables, confusions, shown),
        "pictures": _pictures(scope, tables, confusions, pictures),
        "method": _method(scope, min_score),
    }
    boxes = f"{len(scope.images):,} images, {scope.counts.sum():,.0f} boxes to find"
    classes = f"{np.count_nonzero(scope.counts):,} classes with truth"
    return html_page(
        title,
        f"{boxes} (copies for parent classes included), {classes}.",
        [(key, text, bodies[key]) for key, text in SECTIONS],
        scripts=("script.js",),
        after='<dialog id="viewer" aria-label="Enlarged picture"></dialog>'
        '<script type="application/json" id="data">'
        f"{embed_json(class_data(scope, tables, confusions))}</script>",
    )


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
    heads.append(figures.head("example", num=False))
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
    scope: Scope, tables: Sequence[TableReport], confusions: Confusions, pictures: Sequence[Picture]
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
    pieces = [
        gallery.figure(scope, tables, scores, confusions, picture, pairs, limit)
        for picture in pictures
    ]
    return gallery.controls([table.name for table in tables]) + (
        f'<div class="gallery" id="gallery">{"".join(pieces)}</div>'
    )


def _method(scope: Scope, min_score: float | None) -> str:
    _, where = rarity(scope)
    if scope.train_split is None:
        rare = f"Rarity counts the {escape(where)}: the dataset has no training split."
    else:
        rare = f"Training boxes are those of the split {escape(scope.train_split)}."
    return (
        f"<ul><li>{_METRIC[scope.rule.metric]}</li>"
        f"<li>Counts, confusions and pictures take detections {figures.judged_above(min_score)}; "
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
