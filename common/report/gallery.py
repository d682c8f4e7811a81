"""The pictures of the page with their captions, and the buttons that choose among them."""

import json
from collections.abc import Sequence
from html import escape

import numpy as np

from common.report import drawing
from common.report.analysis import TableReport
from common.report.charts import table_class
from common.report.confusion import Confusions
from common.report.pictures import Picture, Reason
from common.report.scope import Scope

SPARSE = 8  # texts that a small picture can carry


def figure(
    scope: Scope,
    tables: Sequence[TableReport],
    scores: Sequence[np.ndarray],
    confusions: Confusions,
    picture: Picture,
    pairs: dict,
    limit: int,
) -> str:
    """One picture of the gallery: the photo once, a layer of boxes for each table, captions."""
    place = int(np.searchsorted(scope.images, picture.image))
    image_id = scope.dataset.image_id(picture.image)
    view = f'viewBox="0 0 {picture.width} {picture.height}"'
    layers, captions = [], []
    for number, table in enumerate(tables):
        current = "" if number == 0 else " hidden"
        body = drawing.draw(scope, table, picture, pairs, limit)
        num_texts = body.count("<text") - body.count('<text class="box-text unverified"')
        crowded = " crowded" if num_texts > SPARSE else ""
        layers.append(f'<g class="layer{crowded}" data-table="{number}"{current}>{body}</g>')
        wrong, f1 = int(table.image_wrong[place]), scores[number][place]
        captions.append(
            f'<span data-table="{number}"{current}>{table.image_found[place]} of '
            f"{scope.image_counts[place]} found, {wrong} wrong, F1 {f1:.2f}</span>"
        )
    texts = [_reason_text(scope, tables, confusions, reason) for reason in picture.reasons]
    ranks: dict[str, dict[int, int]] = {}
    for reason in picture.reasons:
        ranks.setdefault(reason.kind, {}).setdefault(reason.table, reason.rank)
    attributes = "".join(
        f' data-{kind}="{escape(json.dumps(each), quote=True)}"' for kind, each in ranks.items()
    )
    photo = (
        f'<img src="{picture.data}" alt="" loading="lazy" decoding="async">'
        if picture.data
        else '<span class="no-photo">photo cannot be read</span>'
    )
    label = f"Enlarge {escape(image_id, quote=True)}"
    return (
        f'<figure class="picture" id="picture-{picture.image}"{attributes}>'
        f'<button type="button" class="enlarge" aria-label="{label}">{photo}'
        f'<svg {view} aria-hidden="true">{"".join(layers)}</svg></button>'
        f"<figcaption><b>{escape(image_id)}</b> {''.join(captions)}"
        f'<small title="{escape("; ".join(texts), quote=True)}">{escape(texts[0])}'
        f"{f' and {len(texts) - 1} more' if len(texts) > 1 else ''}</small></figcaption></figure>"
    )


def _reason_text(
    scope: Scope, tables: Sequence[TableReport], confusions: Confusions, reason: Reason
) -> str:
    of = f" of {tables[reason.table].name}" if len(tables) > 1 else ""
    if reason.kind != "confusion":
        return f"{reason.kind} {reason.rank + 1}{of}"
    names = scope.dataset.class_names
    predicted = names[confusions.predicted[reason.rank]]
    return f"{predicted} on {names[confusions.actual[reason.rank]]}{of}"


def controls(names: Sequence[str]) -> str:
    """Buttons above the gallery: which pictures, whose boxes, which boxes."""
    kind_buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(not kind).lower()}">{text}'
        "</button>"
        for kind, text in (
            ("", "All"), ("worst", "Worst"), ("best", "Best"), ("confusion", "Confusions"),
        )
    )  # fmt: skip
    parts = [
        f'<div class="buttons" id="kinds" role="group" aria-label="Pictures">{kind_buttons}</div>'
    ]
    if len(names) > 1:
        buttons = "".join(
            f'<button type="button" data-table="{number}" aria-pressed="{pressed}">'
            f'<i class="key {table_class(number)}"></i>{escape(name)}</button>'
            for number, (name, pressed) in enumerate(
                zip(names, ["true"] + ["false"] * (len(names) - 1), strict=True)
            )
        )
        parts.append(
            f'<div class="buttons" id="layers" role="group" aria-label="Boxes of">{buttons}</div>'
        )
    parts.append('<div class="buttons" id="boxes" role="group" aria-label="Boxes shown">')
    for key, on, styles in (
        ("truth", True, {"found": "found truth"}),
        ("missed", True, {"missed": "missed truth"}),
        ("correct", True, {"correct": "correct"}),
        (
            "wrong",
            True,
            {
                "class": "wrong: class",
                "localisation": "place or duplicate",
                "background": "background",
            },
        ),
        ("unverified", False, {"unverified": "unverified"}),
        ("texts", True, {"": "texts"}),
    ):
        checked = " checked" if on else ""
        swatches = "".join(
            (f'<i class="swatch {style}"></i>' if style else "") + text
            for style, text in styles.items()
        )
        parts.append(f'<label><input type="checkbox" value="{key}"{checked}>{swatches}</label>')
    parts.append("</div>")
    return f'<div class="controls">{"".join(parts)}</div>'
