import itertools
import subprocess
import sys
import threading
import time
import weakref

import pytest

from common.io.parallel import behind, map_ordered, prefetch


def test_results_come_in_the_order_of_the_items():
    def slow_at_first(number):
        time.sleep(0.02 if number == 0 else 0)
        return number**2

    assert list(map_ordered(slow_at_first, range(20), threads=4)) == [n**2 for n in range(20)]


def test_no_more_items_are_drawn_than_the_window_holds():
    drawn = []
    endless = (drawn.append(n) or n for n in itertools.count())
    results = map_ordered(str, endless, threads=2, ahead=3)
    assert next(results) == "0" and len(drawn) == 4
    assert next(results) == "1" and len(drawn) == 5
    results.close()


def test_an_exception_is_raised_at_its_place():
    results = map_ordered(lambda n: 1 // (n - 2), range(5), threads=2)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_exception_of_the_items_is_raised_after_all_results_before_it():
    def items():
        yield from range(5)
        raise KeyError

    for ahead in (0, 2, 10):
        results = map_ordered(str, items(), threads=2, ahead=ahead)
        assert [next(results) for _ in range(5)] == list("01234")
        with pytest.raises(KeyError):
            next(results)


def test_closing_early_cancels_waiting_calls_and_leaves_no_thread():
    called = []
    results = map_ordered(lambda n: called.append(n), range(100), threads=1, ahead=50)
    before = threading.active_count()
    next(results)
    results.close()
    assert len(called) <= 51
    assert threading.active_count() <= before


HANGING = """
import time
from common.io import parallel

parallel._LEAVE_SECONDS = 0.2
results = parallel.map_ordered(lambda n: time.sleep(1000 * n), range(9), threads=2)
next(results)
results.close()
print("closed", flush=True)
"""


def test_a_call_that_hangs_keeps_nobody_from_ending():
    """Neither those who close the iterator nor the process."""
    program = [sys.executable, "-c", HANGING]
    assert subprocess.check_output(program, text=True, timeout=60) == "closed\n"


def test_results_are_not_kept_by_the_threads_that_made_them():
    class Result:
        pass

    results = map_ordered(lambda _: Result(), range(3), threads=2, ahead=0)
    first = weakref.ref(next(results))
    next(results)
    deadline = time.monotonic() + 20
    while first() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first() is None
    results.close()


def test_behind_draws_the_next_item_before_it_yields_one():
    drawn = []
    items = behind((drawn.append(n) or n for n in range(3)), 1)
    assert next(items) == 0 and drawn == [0, 1]
    assert list(items) == [1, 2]
    assert list(behind([], 2)) == []


def test_prefetch_draws_ahead_in_one_other_thread_and_raises_in_place():
    threads = []

    def items():
        for number in range(5):
            threads.append(threading.current_thread())
            yield number
        raise KeyError

    fetched = prefetch(items(), 2)
    assert [next(fetched) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError):
        next(fetched)
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()
