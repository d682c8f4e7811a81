"""The page of a calibration: how reliable each table's scores are, before and after.

Shape legend: F folds, K classes, B bins of scores, g groups of detections in a diagram.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from common.report.frame import html_page
from common.report.plots import COLOURS, svg_text
from ensemble.calibration.counting import Counts
from ensemble.calibration.curves import shifted
from ensemble.calibration.fit import Fitted
from ensemble.calibration.recipes import Choice, describe

_GROUPS = 12
_LEAST = 5  # detections of a point
_SHOWN = 20  # recipes in the table


def build_page(
    names: Sequence[str],
    counts: Sequence[Counts],
    fitted: Sequence[Fitted],
    choice: Choice,
    notes: Mapping[str, Any],
) -> str:
    """The whole page, one file.

    Args:
      names: of the tables.
      counts: of each.
      fitted: to each.
      choice: of the recipe.
      notes: of the calibration file.
    """
    figures = "".join(
        f"<figure>{_image(name, draw_reliability(name, count, table))}</figure>"
        for name, count, table in zip(names, counts, fitted, strict=True)
    )
    reliable = (
        "<p>Share of right detections over the score. A point on the diagonal keeps its promise. "
        "Before: scores of the table; after: calibrated, each image by curves of the other folds. "
        f'Bars: detections.</p><div class="charts">{figures}</div>'
    )
    return html_page(
        f"Calibration on {notes['split']}",
        f"{notes['images']:,} images, metric {escape(notes['metric'])}.",
        (
            ("tables", "Tables", _tables(names, fitted)),
            ("reliability", "Reliability", reliable),
            ("recipes", "Recipes", _recipes(choice)),
        ),
    )


def _image(name: str, svg: str) -> str:
    """A picture of its own: several SVG elements in one page would share ids."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<img alt="Reliability of {escape(name, quote=True)}" style="max-width:100%" '
        f'src="data:image/svg+xml;base64,{data}">'
    )


def _tables(names: Sequence[str], fitted: Sequence[Fitted]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{table.whole.curve.form}</td>"
        f'<td class="num">{"none" if np.isinf(table.prior) else f"{table.prior:g}"}</td>'
        f'<td class="num">{table.error_before:.4f}</td><td class="num">{table.error_after:.4f}</td>'
        f'<td class="num">{table.losses.get("identity", np.nan):.4f}</td>'
        f'<td class="num">{min(table.losses.values()):.4f}</td></tr>'
        for name, table in zip(names, fitted, strict=True)
    )
    numbers = ["prior of class shifts", "ECE before", "ECE after"]
    numbers += ["log loss before", "log loss after"]
    heads = "".join(f'<th class="num">{text}</th>' for text in numbers)
    return (
        f'<div class="scroll"><table><thead><tr><th>table</th><th>form</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _recipes(choice: Choice) -> str:
    rows = "".join(
        f"<tr><td>{escape(describe(tried.recipe))}</td>"
        f'<td class="num">{100 * tried.score:.2f}</td>'
        f"<td>{_role(tried, choice)}</td></tr>"
        for tried in _shown(choice)
    )
    return (
        "<p>Images scored by curves and opinions of the other folds; the best recipe that is not "
        "below the best table alone on the mean of the folds one by one is taken.</p>"
        '<div class="scroll"><table><thead><tr><th>recipe</th><th class="num">figure</th><th></th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _shown(choice: Choice) -> list:
    first = choice.tried[:_SHOWN]
    return first + [tried for tried in (choice.best, choice.single) if tried not in first]


def _role(tried: Any, choice: Choice) -> str:
    if tried == choice.best:
        return "taken"
    return "best table alone" if tried == choice.single else ""


def draw_reliability(name: str, counts: Counts, fitted: Fitted) -> str:
    """Reliability before and after, and the number of detections, as an SVG file's text."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 4.2))
    axes, bars = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    rows, hits = counts.rows, counts.hits
    before = np.broadcast_to(counts.scores.clip(0, 1), rows.shape)
    after = np.stack(
        [shifted(curve(counts.scores), shifts[:, None]) for curve, shifts in fitted.held]
    )
    for number, (what, scores, error) in enumerate(
        (("before", before, fitted.error_before), ("after", after.clip(0, 1), fitted.error_after))
    ):
        promised, found, masses = reliability(scores, rows, hits)
        colour = COLOURS[1 - number]
        enough = masses >= _LEAST
        axes.plot(
            promised[enough], found[enough], "o-", color=colour, markersize=4,
            label=f"{what}, ECE {error:.4f}",
        )  # fmt: skip
        edges = (np.arange(_GROUPS) + 0.3 + 0.4 * number) / _GROUPS
        bars.bar(edges, masses, width=0.4 / _GROUPS, color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="right", title=name)
    axes.legend(loc="upper left", frameon=False)
    bars.set_yscale("log")
    bars.set(xlabel="score", ylabel="number")
    return svg_text(figure)


def reliability(
    scores: Float[np.ndarray, "F K B"],
    rows: Float[np.ndarray, "F K B"],
    hits: Float[np.ndarray, "F K B"],
) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Mean score, share that is right, and number, of detections in groups of equal width."""
    group = np.minimum((scores * _GROUPS).astype(np.int64), _GROUPS - 1).reshape(-1)
    masses = np.bincount(group, rows.reshape(-1), _GROUPS)
    promised = np.bincount(group, (scores * rows).reshape(-1), _GROUPS)
    found = np.bincount(group, hits.reshape(-1), _GROUPS)
    safe = np.maximum(masses, 1e-9)
    return promised / safe, found / safe, masses
