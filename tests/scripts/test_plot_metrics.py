"""Curves of runs: what is drawn is what was logged."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from common.io.errors import UserError
from scripts import plot_metrics
from tests.commands import run

TEXT = "{http://www.w3.org/2000/svg}text"


def write_run(workdir, values):
    workdir.mkdir()
    lines = [json.dumps({"step": 10 * i, "loss": v}) for i, v in enumerate(values, 1)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "other": 1.0}\n')
    return workdir


def test_curve_has_the_logged_points(tmp_path):
    steps, values = plot_metrics.read_curve(write_run(tmp_path / "run", [3.0, 2.0, 1.0]), "loss")
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [3.0, 2.0, 1.0])


def test_unknown_metric_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no 'lost'.*loss, other"):
        plot_metrics.read_curve(write_run(tmp_path / "run", [1.0]), "lost")


def test_running_mean_starts_with_what_there_is():
    np.testing.assert_allclose(plot_metrics.running_mean(np.array([2.0, 4, 6, 8]), 2), [2, 3, 5, 7])


def test_picture_has_a_panel_a_metric_and_names_the_runs(tmp_path):
    for name in ("a<b", "c"):
        write_run(tmp_path / name, [3.0, 2.0, 1.0])
    run(
        "scripts.plot_metrics",
        f"--workdirs={tmp_path / 'a<b'},{tmp_path / 'c'}",
        "--metrics=loss,other",
        f"--output={tmp_path / 'x.svg'}",
    )
    texts = [element.text for element in ElementTree.parse(tmp_path / "x.svg").iter(TEXT)]
    assert all(texts.count(name) == 2 for name in ("a<b", "c"))
    assert {"loss", "other"} <= set(texts)
