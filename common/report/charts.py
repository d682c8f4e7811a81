"""The two diagrams of the page as SVG elements of the page itself, not by matplotlib: their dots
link to the rows of the classes, and the style sheet gives them colours, light or dark.

Shape legend: K classes, R recalls.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 46, 24, 14, 40
MAX_SCATTERED = 4  # tables in the scatter diagram


def _frame(title: str, x_label: str, x_ticks: Sequence[tuple[float, str]], body: str) -> str:
    """A diagram with shares from 0 to 1 upwards; ticks are (share of the width, text)."""
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = _place(0, share)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
    for share, text in x_ticks:
        x, y = _place(share, 0)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}{body}</svg>'
    )


def _place(x: float, y: float) -> tuple[float, float]:
    return (LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM))


def mean_curves(curves: Sequence[Float[np.ndarray, " R"]]) -> str:
    """Mean precision over recall, one line a table."""
    lines = []
    for number, curve in enumerate(curves):
        recalls = np.linspace(0, 1, len(curve))
        points = " ".join(
            "{:.1f},{:.1f}".format(*_place(x, y)) for x, y in zip(recalls, curve, strict=True)
        )
        lines.append(f'<polyline class="line {table_class(number)}" points="{points}"/>')
    ticks = [(share, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    title = "Mean over the classes of the precision at each recall"
    return _frame(title, "recall", ticks, "".join(lines))


def rarity_scatter(
    boxes: Float[np.ndarray, " K"],
    aps: Sequence[Float[np.ndarray, " K"]],
    names: Sequence[str],
    x_label: str,
) -> str:
    """AP over the number of training boxes (logarithmic; 0 stands at the left edge)."""
    known = np.flatnonzero(~np.isnan(aps[0])).tolist()
    top = max(1, int(np.ceil(np.log10(boxes[known].max() + 1)))) if len(known) else 1
    edge = np.log10(10**top + 1)
    share = np.log10(np.maximum(boxes, 0) + 1) / edge
    dots = []
    for number, values in enumerate(aps[:MAX_SCATTERED]):
        for index in known:
            x, y = _place(share[index], values[index])
            title = escape(f"{names[index]}: AP {values[index]:.3f}, {boxes[index]:.0f} boxes")
            dots.append(
                f'<a href="#class-{index}" tabindex="-1"><circle class="dot {table_class(number)}" '
                f'cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{title}</title></circle></a>'
            )
    ticks = [(0, "0")] + [
        (float(np.log10(10**power + 1) / edge), f"{10**power:,}") for power in range(top + 1)
    ]
    return _frame("AP of each class over its training boxes", x_label, ticks, "".join(dots))


def table_class(number: int) -> str:
    """Style class with the colour of a table."""
    return f"t{number % 6}"
