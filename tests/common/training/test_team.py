import sys
import threading
import time

import pytest

from common.io import activity
from common.io.endings import EXIT_AGAIN
from common.io.errors import UserError
from common.training import team as teams
from common.training.team import Team
from tests.common.training.fake_store import FakeStore


class Process:
    """A `Team` whose end is noted instead of ending the tests."""

    def __init__(self, store, index, count=2, clock=time.monotonic):
        self.status = []
        self.ended = threading.Event()
        self.team = Team(store, index, count, f"host{index}", end=self.end, clock=clock)

    def end(self, status):
        self.status.append(status)
        self.ended.set()


def listen(process):
    threading.Thread(target=process.team._listen, daemon=True).start()


def test_a_failure_is_said_by_all_and_ends_all(capsys):
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    listen(first)
    second.team.fail("photos/7.jpg: cannot read the image")
    assert first.ended.wait(10) and second.ended.wait(10)
    assert {*first.status, *second.status} == {1}
    error = capsys.readouterr().err
    assert error == "error: process 1 (host1) failed: photos/7.jpg: cannot read the image\n"


def test_the_first_reason_counts(capsys):
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    first.team.fail("disk full")
    listen(second)
    second.team.fail("Gloo: connection reset by peer")
    assert second.ended.wait(10)
    assert capsys.readouterr().err == "error: process 0 (host0) failed: disk full\n"


def test_all_end_with_the_status_of_what_was_told_first():
    """So that a launcher starts the run again, or not, whichever process it asks."""
    store = FakeStore(3)
    processes = [Process(store, i, 3) for i in range(3)]
    listen(processes[2])
    processes[1].team.blame(0, "is gone")
    processes[0].team.fail("Gloo: connection reset by peer")
    assert all(process.ended.wait(10) for process in processes)
    assert {status for process in processes for status in process.status} == {EXIT_AGAIN}


def test_a_log_on_a_full_disk_keeps_nobody_from_ending(monkeypatch):
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    with open("/dev/full", "w") as stdout, open("/dev/full", "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        print("step 7")
        listen(first)
        second.team.fail("disk full")
        assert first.ended.wait(10) and second.ended.wait(10)


def test_a_process_without_beats_is_gone(capsys):
    now = [0.0]
    store = FakeStore(3)
    processes = [Process(store, i, 3, clock=lambda: now[0]) for i in range(3)]
    for process in processes[::-1]:
        process.team.beat()
    for _ in range(int(teams.LOST_SECONDS) + 1):
        now[0] += 1.0
        store.values["heard/1"] = store.values["heard/2"] = ""
        processes[1].team.beat()
        processes[0].team.beat()
    assert processes[0].status == [EXIT_AGAIN]
    assert "process 2 (host2) is gone: nothing heard for 12 s" in capsys.readouterr().err


def test_a_process_that_never_beats_is_gone(capsys):
    now = [0.0]
    store = FakeStore()
    first = Process(store, 0, clock=lambda: now[0])
    for _ in range(46):
        store.values["heard/1"] = ""
        first.team.beat()
        assert not first.status
        now[0] += 1.0
    first.team.beat()
    assert first.status == [EXIT_AGAIN]
    error = "error: process 1 (not heard of yet) is gone: nothing heard for 45 s\n"
    assert capsys.readouterr().err == error


def test_the_end_of_the_coordinator_is_told(capsys):
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    first.team.beat()
    second.team.beat()
    listen(second)
    store.close()
    assert second.ended.wait(10) and second.status == [EXIT_AGAIN]
    assert "process 0 (host0), which coordinates the run, is gone" in capsys.readouterr().err


def test_a_barrier_names_who_is_absent():
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    second.team.beat()
    with pytest.raises(UserError, match=r"waited 0 s .*\(export\); absent: process 1 \(host1\)"):
        first.team.barrier("export", 0.05)


def test_who_waits_for_input_is_to_blame_for_a_stall(capsys):
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    activity.step_done(7)
    first.team.beat()
    with activity.doing(activity.INPUT):
        second.team.beat()
    store.values["heard/1"] = ""
    first.team.stalled(90)
    assert first.status == [EXIT_AGAIN]
    text = "process 1 (host1) is waiting for input: no step finished for 90 s after step 7"
    assert text in capsys.readouterr().err


def test_scoring_is_no_stall():
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    with activity.doing(activity.SCORING):
        first.team.beat()
    second.team.beat()
    second.team.stalled(90)
    assert not second.status


def test_the_log_line_names_the_slowest_host():
    store = FakeStore()
    first, second = Process(store, 0), Process(store, 1)
    activity.data_wait(0.4)
    second.team.beat()
    for step in range(3):
        activity.step_done(step)
    activity.data_wait(0.1)
    first.team.beat()
    activity.data_wait(0.0)
    assert first.team.slowest() == "  most data wait 40% host1  host1 3 steps behind"
    assert Process(FakeStore(1), 0, 1).team.slowest() == ""
