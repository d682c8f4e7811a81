"""Curves over the steps of a run as small SVG diagrams, in the colours of the page.

Shape legend: n points.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from common.report.run_log import running_mean

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 210, 58, 10, 10, 34
MAX_POINTS = 400  # drawn of a curve, or a run of a million steps makes a page of 100 MB
_SMOOTHED = 30  # points from which on a running mean is drawn over the values


def line_chart(
    title: str,
    steps: Float[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    end: float,
    *,
    dots: bool = False,
) -> str:
    """One figure of a run over its steps, as an HTML `figure`.

    Args:
      title: above the diagram.
      steps: ascending.
      values: NaN and infinite ones leave gaps.
      end: last step of the axis.
      dots: mark each point, for the few of evaluations.
    """
    steps, values = thinned(steps), thinned(values)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(values):
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no finite value</p></figure>"
    low, high = _limits(values)
    x = LEFT + steps / max(end, 1.0) * (WIDTH - LEFT - RIGHT)
    y = (
        HEIGHT
        - BOTTOM
        - (np.clip(values, low, high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    )
    parts = [*_axes(low, high, end)]
    smooth = len(values) >= _SMOOTHED
    if smooth:
        mean = running_mean(y, max(len(y) // 20, 2))
        parts.append(f'<polyline class="line t0 faint" points="{_points(x, y)}"/>')
        parts.append(f'<polyline class="line t0" points="{_points(x, mean)}"/>')
    else:
        parts.append(f'<polyline class="line t0" points="{_points(x, y)}"/>')
    if dots:
        parts += [
            f'<circle class="dot t0" cx="{a:.1f}" cy="{b:.1f}" r="4"><title>step {s:.0f}: '
            f"{v:.4g}</title></circle>"
            for a, b, s, v in zip(x, y, steps, values, strict=True)
        ]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}, last '
        f'{values[-1]:.4g}">{"".join(parts)}</svg></figure>'
    )


def sparkline(values: Sequence[float]) -> str:
    """A curve as small as a word, from 0 to 1, one place for each value; NaN leaves it out."""
    xs = np.linspace(2, 78, len(values)) if len(values) > 1 else np.array([40.0])
    known = [(x, 20 - 18 * v) for x, v in zip(xs, values, strict=True) if np.isfinite(v)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
    dot = f'<circle class="dot t0" cx="{known[-1][0]:.1f}" cy="{known[-1][1]:.1f}" r="2"/>'
    return (
        '<svg class="spark" viewBox="0 0 80 22" aria-hidden="true">'
        f'<polyline class="line t0" points="{points}"/>{dot if known else ""}</svg>'
        if known
        else ""
    )


def thinned(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """At most MAX_POINTS of them, evenly spread, the last one included."""
    if len(values) <= MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]


def _limits(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """From zero, where nothing is below it, to where a first spike is cut off."""
    low = min(0.0, float(values.min()))
    high = float(np.quantile(values, 0.98)) * 1.08 if len(values) > 8 else float(values.max())
    high = max(high, float(values[-1]))
    return low, high if high > low else low + 1.0


def _axes(low: float, high: float, end: float) -> list[str]:
    bottom, width, height = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = []
    for share in (0, 0.5, 1):
        y = bottom - share * height
        value = low + share * (high - low)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
        x, anchor = LEFT + share * width, ("start", "middle", "end")[round(2 * share)]
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{share * end:,.0f}</text>'
        )
    return parts


def _points(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
