"""Curves of a run are what was logged, evaluations what was scored."""

import json

import numpy as np
import pytest

from common.io.errors import UserError
from common.report import curves
from common.report.run_log import RunLog, read_evaluations, running_mean
from tests.run_logs import write_run

AP = "PerformanceByCategory/AP/{}"


def test_curve_has_the_logged_points(tmp_path):
    steps, values = RunLog(write_run(tmp_path / "run", [3.0, 2.0, 1.0])).curve("loss")
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [3.0, 2.0, 1.0])


def test_unknown_figure_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no 'lost'.*loss, other"):
        RunLog(write_run(tmp_path / "run", [1.0])).curve("lost")


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_named(tmp_path):
    path = write_run(tmp_path / "run", [1.0]) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 60, "lo')
    assert len(RunLog(tmp_path / "run").lines) == 2
    path.write_text("{broken\n" + whole)
    with pytest.raises(UserError, match="line 1: not JSON"):
        RunLog(tmp_path / "run")


def test_running_mean_starts_with_what_there_is():
    np.testing.assert_allclose(running_mean(np.array([2.0, 4, 6, 8]), 2), [2, 3, 5, 7])


def test_evaluations_of_the_training_and_of_a_job_beside_it(tmp_path):
    def score(folder, value):
        folder.mkdir(parents=True)
        figures = {"AP": value, AP.format("/m/01"): value, AP.format("cat"): 0.5}
        (folder / "val_metrics.json").write_text(json.dumps(figures))

    score(tmp_path / "evaluation/100", 0.2)
    score(tmp_path / "watch/val/100", 0.9)  # the training scored this step itself
    score(tmp_path / "watch/val/20", 0.1)
    (tmp_path / "evaluation/100/val.parquet").touch()
    first, second = read_evaluations(tmp_path)
    assert (first.step, first.figures, first.table) == (20, {"AP": 0.1}, None)
    assert (second.step, second.name, second.figures["AP"]) == (100, "val", 0.2)
    assert second.classes == {"/m/01": 0.2, "cat": 0.5}
    assert second.table == tmp_path / "evaluation/100/val.parquet"


def test_long_curves_are_thinned_with_their_ends_kept():
    values = np.arange(10_001.0)
    thin = curves.thinned(values)
    assert len(thin) == curves.MAX_POINTS and thin[0] == 0 and thin[-1] == 10_000


def test_a_curve_leaves_out_what_is_not_finite():
    steps = np.arange(4.0)
    chart = curves.line_chart("x<y", steps, np.array([1.0, np.nan, np.inf, 3.0]), 3.0, dots=True)
    assert "nan" not in chart and "inf" not in chart
    assert chart.count("<circle") == 2 and "x&lt;y" in chart
    assert "no finite value" in curves.line_chart("x", steps, np.full(4, np.nan), 3.0)
