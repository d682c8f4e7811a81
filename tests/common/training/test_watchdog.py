import math
import time

import pytest

from common.io import activity
from common.io.errors import UserError
from common.training.watchdog import StallWatchdog, TrainingDiverged, _end_stalled, check_finite


def test_finite_metrics_pass():
    check_finite({"loss": 1.5, "gradient_norm": 0.0}, 3, ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence_names_term_step_and_images(value):
    metrics = {"loss/rpn_box": value, "loss/rpn_class": 0.25}
    with pytest.raises(TrainingDiverged) as error:
        check_finite(metrics, 1234, ["000a", "000b"])
    text = str(error.value)
    assert "loss/rpn_box" in text and "loss/rpn_class" not in text
    assert "step 1234" in text and "000a, 000b" in text and "\n" not in text
    assert isinstance(error.value, UserError)  # ends the run with one line


def test_a_long_list_of_images_is_cut():
    with pytest.raises(TrainingDiverged, match="and 968 more"):
        check_finite({"loss": math.nan}, 1, [f"id{i}" for i in range(1000)])


def test_stall_prints_where_all_threads_are(tmp_path):
    with (tmp_path / "stacks").open("w+") as file:
        with StallWatchdog(0.1, file=file):
            activity.step_done(1)
            _wait_like_a_hung_collective()
        text = (tmp_path / "stacks").read_text()
    assert "_wait_like_a_hung_collective" in text
    assert 1 <= text.count("Timeout") <= 5  # again only after as long a time


def _wait_like_a_hung_collective():
    time.sleep(0.35)


def test_steps_keep_it_quiet(tmp_path):
    with (tmp_path / "stacks").open("w+") as file:
        with StallWatchdog(2.0, file=file):
            for step in range(10):
                time.sleep(0.01)
                activity.step_done(step)
        assert (tmp_path / "stacks").read_text() == ""


def test_what_has_taken_long_is_no_stall_once_it_has_ended(tmp_path):
    """As after an hour of scoring, before the next step is done."""
    ended = []
    with (
        (tmp_path / "stacks").open("w+") as file,
        StallWatchdog(0.5, abort_after=1, file=file, abort=ended.append),
    ):
        for _ in range(8):
            with activity.doing(activity.SCORING):
                time.sleep(0.1)
        assert not ended and (tmp_path / "stacks").read_text() == ""
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert 0.5 < ended[0] < 10


@pytest.mark.parametrize(("what", "statuses"), [("", [75]), (activity.PAUSE, [])])
def test_a_stall_says_start_again_and_a_pause_is_none(monkeypatch, capsys, what, statuses):
    found = []
    monkeypatch.setattr("os._exit", found.append)
    activity.step_done(7)
    with activity.doing(what):
        _end_stalled(90.0)
    assert found == statuses
    said = capsys.readouterr().err
    assert ("no step finished for 90 s after step 7" in said) == bool(statuses)


def test_zero_seconds_turns_it_off(tmp_path):
    with (tmp_path / "stacks").open("w+") as file:
        with StallWatchdog(0, file=file):
            time.sleep(0.05)
        assert (tmp_path / "stacks").read_text() == ""
