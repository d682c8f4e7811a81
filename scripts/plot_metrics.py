"""Draws curves of several runs into one SVG picture, one panel a metric.

    python -m scripts.plot_metrics --workdirs=run_a,run_b --metrics=loss --output=curves.svg

Metrics are names in the runs' metrics.jsonl. Noisy ones are drawn with a running mean over them.
"""

import json
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from absl import flags

from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError

WIDTH, HEIGHT, MARGIN = 420, 260, 46
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by everyone


def read_curve(workdir: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric of a run.

    Raises:
      UserError: no metrics.jsonl there, or the metric is not in it.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected the work directory of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(line["step"], line[metric]) for line in lines if metric in line]
    if not points:
        names = sorted({name for line in lines for name in line} - {"step"})
        raise UserError(f"{path}: no {metric!r}, expected one of {', '.join(names)}")
    steps, values = np.array(points, np.float64).T
    return steps, values


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values ending at each one."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)


def panel(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, left: int) -> str:
    """SVG elements of one diagram whose left edge is at `left`."""
    steps = np.concatenate([s for s, _ in curves.values()])
    values = np.concatenate([v for _, v in curves.values()])
    # A single first spike would flatten everything else.
    low, high = min(0.0, values.min()), np.quantile(values, 0.99) * 1.05 or 1.0
    plot_width, plot_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(step, value):
        x = left + MARGIN + plot_width * step / max(steps.max(), 1)
        y = MARGIN + plot_height * (1 - (np.clip(value, low, high) - low) / (high - low))
        return x, y

    parts = [f'<text x="{left + MARGIN}" y="22" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        x, y = place(0, value)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{plot_width}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x, y = place(share * steps.max(), low)
        parts.append(
            f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">'
            f"{share * steps.max():.0f}</text>"
        )
    for index, (name, (run_steps, run_values)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        window = max(len(run_values) // 20, 1)
        smooth = running_mean(run_values, window)
        for series, style in ((run_values, 'opacity="0.25"'), (smooth, "")):
            points = " ".join(
                "{:.1f},{:.1f}".format(*place(s, v)) for s, v in zip(run_steps, series, strict=True)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" '
                f'stroke-width="2" {style}/>'
            )
        x, y = left + WIDTH - MARGIN - 110, MARGIN + 14 + 16 * index
        parts.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
    return "\n".join(parts)


def define_flags() -> None:
    flags.DEFINE_list("workdirs", None, "Work directories of runs.", required=True)
    flags.DEFINE_list("metrics", ["loss"], "Names in metrics.jsonl, one panel each.")
    flags.DEFINE_string("output", None, "SVG file to write.", required=True)


def main():
    panels = []
    for index, metric in enumerate(flags.FLAGS.metrics):
        curves = {Path(w).name: read_curve(Path(w), metric) for w in flags.FLAGS.workdirs}
        panels.append(panel(curves, metric.rsplit("/", 1)[-1], index * WIDTH))
    body = "\n".join(panels)
    write_text(
        flags.FLAGS.output,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n{body}\n</svg>\n',
    )
    print(f"wrote {flags.FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
