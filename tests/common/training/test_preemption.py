import threading

import pytest

from common.io.errors import Stopped
from common.training.preemption import StopPoints
from tests.common.training.fake_store import FakeStore


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
    processes[1]._store.key_value_set("stop/asked/1", "SIGTERM at host1", True)
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
