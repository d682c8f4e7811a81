import os
import signal
import sys
import threading
import time

import pytest

from common.io.endings import EXIT_AGAIN
from common.io.errors import Stopped
from common.training import preemption, team
from common.training.preemption import StopPoints
from tests.common.training.fake_store import FakeStore
from tests.common.training.test_team import Process


def test_alone_a_request_stops_at_the_next_point():
    points = StopPoints()
    points.passes()
    points.ask("SIGTERM at host")
    with pytest.raises(Stopped, match="SIGTERM at host"):
        points.passes()


@pytest.mark.parametrize("passed", [(5, 5, 5), (7, 3, 6)])
def test_all_stop_at_one_point_that_none_has_passed(passed):
    """Whoever is ahead when one is asked to stop."""
    store = FakeStore(3)
    processes = [StopPoints(store, i, 3) for i in range(3)]
    for points, count in zip(processes, passed, strict=True):
        for _ in range(count):
            points.passes()
    processes[1].ask("SIGTERM at host1")
    store.key_value_set("stop/asked/1", "SIGTERM at host1")
    threads = [threading.Thread(target=points.agree) for points in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for points, count in zip(processes, passed, strict=True):
        for _ in range(count, max(passed)):
            points.passes()
        with pytest.raises(Stopped, match="SIGTERM at host1"):
            points.passes()


def test_processes_that_meet_nowhere_stop_for_themselves():
    store = FakeStore(2)
    points, met = StopPoints(store, 0, 2), StopPoints(store, 0, 2)
    met.passes()
    for each in (points, met):
        each.passes_alone()
        each._reason = "SIGTERM at host1"
    with pytest.raises(Stopped):
        points.passes_alone()
    met.passes_alone()  # the next shared point stops all


def test_a_store_that_fails_for_a_moment_changes_no_agreement():
    """A process that has told its count passes no further point, whatever happens to the others."""

    class Failing(FakeStore):
        failures = 3

        def key_value_dir_get(self, key):
            found = super().key_value_dir_get(key)
            if key == "stop/passed/" and found and self.failures:
                self.failures -= 1
                raise RuntimeError("UNAVAILABLE: connection reset")
            return found

    store = Failing()
    first, second = (StopPoints(store, i, 2) for i in range(2))
    for _ in range(5):
        first.passes()
    first.ask("SIGTERM at host0")
    agreeing = threading.Thread(target=first.agree)
    agreeing.start()
    while "stop/passed/0" not in store.values or store.failures:
        time.sleep(0.01)
    passing = threading.Thread(target=lambda: [first.passes() for _ in range(2)])
    passing.start()
    for _ in range(7):
        second.passes()
    second.agree()
    agreeing.join(20)
    passing.join(20)
    assert first._passed == 7
    for points in (first, second):
        with pytest.raises(Stopped):
            points.passes()


def test_a_dead_process_ends_the_agreement_and_the_run(monkeypatch):
    """The beats go on meanwhile, so it is missed as ever."""
    monkeypatch.setattr(team, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(team, "LOST_SECONDS", 0.5)
    store = FakeStore(3)
    processes = [Process(store, i, 3) for i in range(3)]
    processes[2].team.beat()  # its last one
    agreed = []
    for process in processes[:2]:
        points = StopPoints(store, process.team.index, 3, process.team.ended)
        points.ask("SIGTERM at a host")
        process.team.every_second(lambda points=points: agreed.append(points.agree()), "points")
        process.team.start()
    assert all(process.ended.wait(20) for process in processes[:2])
    assert [process.status for process in processes[:2]] == [[EXIT_AGAIN], [EXIT_AGAIN]]
    for thread in processes[0].team._threads + processes[1].team._threads:
        thread.join(20)
    assert agreed == [None, None]  # both have come back


def test_a_signal_counts_although_its_line_cannot_be_written(monkeypatch):
    points = StopPoints()
    monkeypatch.setattr(preemption, "_points", points)
    reader, writer = os.pipe()
    os.write(writer, bytes([signal.SIGTERM]))
    os.close(writer)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        preemption._hear(reader, "host")
    os.close(reader)
    with pytest.raises(Stopped, match="SIGTERM at host"):
        points.passes()
