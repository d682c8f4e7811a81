"""Maps over threads that keep the order of their items and hold a bounded number of them."""

import collections
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LEAVE_SECONDS = 10.0  # that calls under way may take when nobody wants their results any more


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_threads(threads: int = 0, processes: int = 1) -> int:
    """The threads of all processes that a config asks for; 0: twice the cores, at most 64 each."""
    return threads or min(2 * usable_cores(), 64 * processes)


def map_ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int = 0,
    ahead: int | None = None,
) -> Generator[Result, None, None]:
    """Yields function(item) for each item, in order, computed in threads.

    Items are drawn in the caller's thread, as results are asked for. An exception of `function` is
    raised at the place of its result, one of `items` after the results of all items before it.
    Closing the iterator early cancels the calls that have not begun and waits for the others, but
    not for long: one that hangs, as a read of a dead file system, keeps nobody from ending.

    Args:
      function: of one item; called from several threads.
      items: may be endless.
      threads: number of threads, 0 for `num_threads()`.
      ahead: number of items that are drawn before the first result is waited for, which bounds what
        is held in memory; twice the threads unless given.
    """
    threads = num_threads(threads)
    ahead = 2 * threads if ahead is None else ahead
    pool = _Threads(threads)
    pending: collections.deque[Future[Result]] = collections.deque()
    try:
        for call in _calls(pool, function, items):
            pending.append(call)
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for call in pending:
            call.cancel()
        pool.leave()


class _Threads:
    """Threads that make calls. (Python would wait at its end for those of its own executor.)"""

    def __init__(self, count: int):
        """At most `count`, started as calls come."""
        self._count = count
        self._calls: queue.SimpleQueue[tuple[Future, Callable, Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        future: Future[Result] = Future()
        self._calls.put((future, function, item))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name="map", daemon=True)
            thread.start()
            self._threads.append(thread)
        return future

    def leave(self) -> None:
        """Ends the threads once the calls are made; after a while without those that hang."""
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            _make(*call)
            del call  # or its result would stay in memory until the next one


def _make(future: Future[Result], function: Callable[[Item], Result], item: Item) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(item)
    except BaseException as error:
        future.set_exception(error)
        del future  # which this frame, and so the error, would hold
    else:
        future.set_result(result)


def _calls(
    pool: _Threads, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Future[Result]]:
    """The call for each item; if `items` raises, the last call is one that failed so."""
    try:
        for item in items:
            yield pool.submit(function, item)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed


def prefetch(items: Iterable[Item], ahead: int = 1) -> Iterator[Item]:
    """Yields the items, which are drawn in a thread of their own, `ahead` of the caller."""
    iterator, end = iter(items), object()
    for item in map_ordered(
        lambda _: next(iterator, end), itertools.repeat(None), threads=1, ahead=ahead
    ):
        if item is end:
            return
        yield item  # type: ignore[misc]


def behind(items: Iterable[Item], count: int = 1) -> Iterator[Item]:
    """Yields the items in order, each only after the next `count` items have been drawn.

    Where drawing an item starts work on the devices, that work runs while the caller fetches and
    handles the results of the item before.
    """
    pending: collections.deque[Item] = collections.deque()
    for item in items:
        pending.append(item)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending
