"""A square matrix of shares as an SVG picture: one cell a pair, darker is more."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Bool, Float

CELL = 16  # pixels
MARGIN = 12
TEXT = 6.2  # width of a letter
# From white over green to dark blue; told apart without colour vision, and in grey.
COLOURS = ((255, 255, 255), (161, 218, 180), (44, 127, 184), (8, 29, 88))


def colour(value: float) -> str:
    """Colour of a number in [0, 1]."""
    place = float(np.clip(value, 0, 1)) * (len(COLOURS) - 1)
    first = min(int(place), len(COLOURS) - 2)
    share = place - first
    low, high = COLOURS[first], COLOURS[first + 1]
    mixed = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def draw_matrix(
    matrix: Float[np.ndarray, "n n"],
    labels: Sequence[str],
    title: str,
    *,
    known: Bool[np.ndarray, "n n"] | None = None,
    frame: Bool[np.ndarray, "n n"] | None = None,
) -> str:
    """SVG text; values show when the mouse rests on a cell.

    Args:
      matrix: shares in [0, 1].
      labels: of rows and columns.
      title: above the picture.
      known: cells with a value, the others are grey; default: all off the diagonal.
      frame: cells to draw a frame around.
    """
    known = ~np.eye(len(matrix), dtype=bool) if known is None else known
    frame = np.zeros(matrix.shape, bool) if frame is None else frame
    size = len(matrix)
    side = size * CELL
    label_width = max((len(label) for label in labels), default=0) * TEXT + 8
    left, top = MARGIN + label_width, MARGIN + 28 + label_width
    width, height = left + side + MARGIN + 84, top + side + MARGIN
    parts = [f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="14">{escape(title)}</text>']
    for row in range(size):
        y = top + row * CELL
        parts.append(
            f'<text x="{left - 6:.0f}" y="{y + CELL - 4:.0f}" text-anchor="end">'
            f"{escape(labels[row])}</text>"
        )
        x = left + row * CELL + CELL - 4
        parts.append(
            f'<text transform="translate({x:.0f},{top - 6:.0f}) rotate(-90)">'
            f"{escape(labels[row])}</text>"
        )
        for column in range(size):
            x = left + column * CELL
            fill, value = "#d8d8d8", "unknown"
            if known[row, column]:
                fill = colour(matrix[row, column])
                value = f"{matrix[row, column]:.3f}"
            inset, stroke = (1, "#d55e00") if frame[row, column] else (0, "#eee")
            parts.append(
                f'<rect x="{x + inset:.0f}" y="{y + inset:.0f}" width="{CELL - 2 * inset}" '
                f'height="{CELL - 2 * inset}" fill="{fill}" stroke="{stroke}" '
                f'stroke-width="{1 + inset}">'
                f"<title>{escape(labels[row])} | {escape(labels[column])}: {value}</title></rect>"
            )
    for step in range(11):
        y = top + (10 - step) * CELL
        x = left + side + MARGIN + 6
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{CELL}" height="{CELL}" '
            f'fill="{colour(step / 10)}" stroke="#eee"/>'
        )
        parts.append(f'<text x="{x + CELL + 6:.0f}" y="{y + CELL - 4:.0f}">{step / 10:.1f}</text>')
    y = top + 12 * CELL
    parts.append(
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{CELL}" height="{CELL}" fill="#d8d8d8"/>'
        f'<text x="{x + CELL + 6:.0f}" y="{y + CELL - 4:.0f}">unknown</text>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n{body}\n</svg>\n'
    )
