"""Draws curves of several runs into one SVG picture, one panel a metric.

    python -m scripts.plot_metrics --workdirs=run_a,run_b --metrics=loss --output=curves.svg

Metrics are names in the runs' metrics.jsonl. Noisy ones are drawn with a running mean over them.
"""

import numpy as np
from absl import flags

from common.io.atomic import write_text
from common.io.commands import run_main
from common.report.plots import COLOURS, svg_text
from common.report.run_log import RunLog, running_mean


def draw_panel(axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draws the curves of runs into matplotlib's axes, with a running mean over each."""
    for index, (name, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.25)
        smooth = running_mean(values, max(len(values) // 20, 1))
        axes.plot(steps, smooth, color=colour, label=name)
    values = np.concatenate([values for _, values in curves.values()])
    # A single first spike would flatten everything else.
    axes.set_ylim(min(0.0, values.min()), np.quantile(values, 0.99) * 1.05 or 1.0)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()


def define_flags() -> None:
    flags.DEFINE_list("workdirs", None, "Work directories of runs.", required=True)
    flags.DEFINE_list("metrics", ["loss"], "Names in metrics.jsonl, one panel each.")
    flags.DEFINE_string("output", None, "SVG file to write.", required=True)


def main() -> None:
    from matplotlib.figure import Figure

    metrics = flags.FLAGS.metrics
    runs = [RunLog(workdir) for workdir in flags.FLAGS.workdirs]
    figure = Figure((4.4 * len(metrics), 3.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        curves = {run.workdir.name: run.curve(metric) for run in runs}
        draw_panel(axes, curves, metric.rsplit("/", 1)[-1])
    write_text(flags.FLAGS.output, svg_text(figure))
    print(f"wrote {flags.FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
