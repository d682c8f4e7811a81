"""Plots as SVG text, by matplotlib, which is imported only when something is drawn.

Shape legend: n classes.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by everyone


def svg_text(figure: "Figure") -> str:
    """The figure as an SVG file's text, the same for equal figures; its letters stay text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plots"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def draw_matrix(
    matrix: Float[np.ndarray, "n n"],
    labels: Sequence[str],
    title: str,
    *,
    known: Bool[np.ndarray, "n n"] | None = None,
    frame: Bool[np.ndarray, "n n"] | None = None,
) -> str:
    """A matrix of shares as an SVG picture with the percentage in each cell, darker for more.

    Args:
      matrix: shares in [0, 1].
      labels: of rows and columns.
      title: above the picture.
      known: cells with a value, the others are grey; default: all off the diagonal.
      frame: cells to draw a frame around.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    size = len(matrix)
    known = ~np.eye(size, dtype=bool) if known is None else known
    side = 0.24 * size  # inches
    figure = Figure((side + 1, side))
    axes = figure.subplots()
    axes.set_facecolor("#d8d8d8")
    image = axes.imshow(np.where(known, matrix, np.nan), cmap="YlGnBu", vmin=0, vmax=1)
    axes.set_title(title)
    axes.xaxis.tick_top()
    axes.set_xticks(range(size), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(size), labels, fontsize=8)
    for row, column in np.argwhere(known).tolist():
        share = matrix[row, column]
        colour, text = "w" if share > 0.5 else "k", f"{100 * share:.0f}"
        axes.text(column, row, text, color=colour, fontsize=5, ha="center", va="center")
    for row, column in np.argwhere(frame).tolist() if frame is not None else ():
        corner = (column - 0.45, row - 0.45)
        axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=COLOURS[1], linewidth=1.5))
    figure.colorbar(image, shrink=0.5)
    return svg_text(figure)
