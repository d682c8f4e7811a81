"""The page about one training: curves, speed, AP of each class over time, detections over time."""

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from common.data.dataset import Dataset
from common.report import curves, over_time
from common.report.classes import bar_cell, sort_head
from common.report.frame import html_page
from common.report.pictures import Picture
from common.report.run_log import Evaluation, RunLog

_SPEED = {
    "images_per_second": "images a second",
    "data_wait_share": "share of the time that waits for data",
    "mfu": "share of the peak FLOPs",
    "device_memory_gib": "memory of the fullest device, GiB",
}
_OPTIMISER = {"learning_rate": "learning rate", "gradient_norm": "gradient norm"}
_NOT_DRAWN = ("seconds_left", "images_per_second_per_device")


@dataclasses.dataclass(frozen=True)
class RunView:
    """What the page shows.

    Attributes:
      log: of the run.
      config: of the run, as nested dictionaries.
      evaluations: all of them, in order of steps.
      dataset: that of the run, None where it cannot be reached.
      train_counts: training boxes of each class, None without a dataset.
      pictures: photos to show detections on.
      min_score: of the detections drawn.
      fed: data URI of a picture of what training is fed with, '' for none.
    """

    log: RunLog
    config: dict[str, Any]
    evaluations: Sequence[Evaluation]
    dataset: Dataset | None
    train_counts: np.ndarray | None
    pictures: Sequence[Picture]
    min_score: float
    fed: str = ""


def build_run_page(view: RunView) -> str:
    """The whole page."""
    name = str(view.config.get("name", view.log.workdir.name))
    end = view.log.lines[-1]["step"] if view.log.lines else 0
    groups = [
        ("losses", "Losses", _curves(view, _losses(view.log.names))),
        ("speed", "Speed", _curves(view, _present(view, _SPEED))),
        ("training", "Training", _curves(view, {**_present(view, _OPTIMISER), **_others(view)})),
        ("evaluations", "Evaluations", _evaluations(view)),
        ("classes", "Classes over time", _classes(view)),
        ("pictures", "Detections over time", _pictures(view)),
        ("fed", "What training is fed with", _fed(view)),
    ]
    sections = [("summary", "Summary", _summary(view))]
    sections += [group for group in groups if group[2]]
    lead = f"{escape(str(view.log.workdir))}, step {end:,}."
    return html_page(f"Training run: {name}", lead, sections)


def _losses(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names if name == "loss" or name.startswith("loss/")}


def _present(view: RunView, titles: dict[str, str]) -> dict[str, str]:
    return {name: title for name, title in titles.items() if name in view.log.names}


def _others(view: RunView) -> dict[str, str]:
    """Figures to watch: all that is neither loss, speed nor evaluation."""
    known = {*_losses(view.log.names), *_SPEED, *_OPTIMISER, *_NOT_DRAWN}
    names = [n for n in view.log.names if n not in known and not n.startswith("evaluation/")]
    return {name: name.replace("_", " ") for name in names}


def _curves(view: RunView, titles: dict[str, str]) -> str:
    if not titles:
        return ""
    end = view.log.lines[-1]["step"]
    figures = [
        curves.line_chart(title, *view.log.curve(name), end) for name, title in titles.items()
    ]
    return f'<div class="small charts">{"".join(figures)}</div>'


def _summary(view: RunView) -> str:
    config, log = view.config, view.log
    facts = {"config": config.get("name"), "data": config.get("data", {}).get("dir")}
    if view.dataset is not None:
        facts["classes"] = f"{view.dataset.num_classes:,}"
    if "loss" in log.names:
        facts["loss, last logged"] = f"{log.curve('loss')[1][-1]:.4g}"
    if "images_per_second" in log.names:
        facts["images a second, median"] = f"{np.median(log.curve('images_per_second')[1]):,.1f}"
    if "data_wait_share" in log.names:
        facts["waiting for data, mean"] = f"{np.mean(log.curve('data_wait_share')[1]):.0%}"
    if log.goodput:
        facts["time"] = _time(log.goodput)
    rows = [
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "")
    ]
    for name, evaluations in _by_name(view.evaluations).items():
        figure = next(iter(evaluations[0].figures), None)
        if figure is not None:
            best = max(evaluations, key=lambda each: each.figures.get(figure, -1.0))
            rows.append(
                f'<tr><th scope="row">best {escape(figure)} of {escape(name)}</th>'
                f"<td>{best.figures[figure]:.4f} at step {best.step:,}</td></tr>"
            )
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def _time(goodput: dict[str, Any]) -> str:
    """Hours of a run with what took them, the longest first, and how often it was started."""
    seconds, starts = goodput.get("seconds", {}), goodput.get("starts", 1)
    total = max(sum(seconds.values()), 1e-9)
    parts = sorted(seconds, key=seconds.__getitem__, reverse=True)
    shares = ", ".join(f"{part} {seconds[part] / total:.0%}" for part in parts if seconds[part])
    times = "once" if starts == 1 else f"{starts} times"
    return f"{total / 3600:,.2f} h, started {times}: {shares}"


def _by_name(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.name, []).append(evaluation)
    return groups


def _evaluations(view: RunView) -> str:
    end = float(view.log.lines[-1]["step"]) if view.log.lines else 1.0
    figures = []
    for name, evaluations in _by_name(view.evaluations).items():
        for figure in evaluations[0].figures:
            points = [(e.step, e.figures[figure]) for e in evaluations if figure in e.figures]
            steps, values = np.array(points, np.float64).T
            title = f"{name}: {figure}"
            figures.append(curves.line_chart(title, steps, values, max(end, steps[-1]), dots=True))
    return f'<div class="small charts">{"".join(figures)}</div>' if figures else ""


def _classes(view: RunView) -> str:
    """AP of each class at the first, the best and the last evaluation, of each scored split."""
    return "".join(
        _class_table(view, name, evaluations)
        for name, evaluations in _by_name(view.evaluations).items()
        if any(evaluation.classes for evaluation in evaluations)
    )


def _class_table(view: RunView, name: str, evaluations: Sequence[Evaluation]) -> str:
    names, counts = {}, {}
    if view.dataset is not None and view.train_counts is not None:
        names = dict(zip(view.dataset.class_labels, view.dataset.class_names, strict=True))
        counts = dict(zip(view.dataset.class_labels, view.train_counts.tolist(), strict=True))
    heads = [sort_head("class", "text")]
    heads += [sort_head("training boxes", "number")] if counts else []
    heads += [sort_head(text, "number") for text in ("first", "best", "last", "last − best")]
    heads.append('<th scope="col">over time</th>')
    rows = []
    for label in dict.fromkeys(key for each in evaluations for key in each.classes):
        values = np.array([each.classes.get(label, np.nan) for each in evaluations])
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        first, best, last = known[0], known.max(), known[-1]
        title = names.get(label, label)
        count = counts.get(label)
        fall = last - best
        rows.append(
            f'<tr><th scope="row" data-v="{escape(title, quote=True)}">{escape(title)}</th>'
            + ("" if count is None else f'<td class="num" data-v="{count}">{count:,.0f}</td>')
            + "".join(bar_cell(value) for value in (first, best, last))
            + f'<td class="num" data-v="{fall:.6f}">{fall:+.3f}</td>'
            + f"<td>{curves.sparkline(values.tolist())}</td></tr>"
        )
    return (
        f'<h3>{escape(name)}</h3><div class="scroll tall"><table class="sortable"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pictures(view: RunView) -> str:
    shown = over_time.chosen_steps(view.evaluations)
    if view.dataset is None or not view.pictures or not shown:
        return ""
    return (
        f"<p>Detections with a score of at least {view.min_score:g}: green where they overlap an "
        "object of their class by half, else red. White: the truth.</p>"
        + over_time.grid(view.dataset, view.pictures, shown, view.min_score)
    )


def _fed(view: RunView) -> str:
    if not view.fed:
        return ""
    return (
        "<p>Photos as the config puts them on their canvas. Thick: the class that it was drawn "
        "for. Crossed out: where nothing is background.</p>"
        f'<img class="fed" src="{view.fed}" alt="photos of a batch with their boxes">'
    )
