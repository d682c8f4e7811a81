"""Timing of two or more programs side by side, in one process or in one each."""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.io.memory import keep_freed_memory


def time_in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[np.ndarray]:
    """Returns the seconds of each call, (repeats,) per callable.

    The callables take turns, so that whatever else the machine does meets all of them alike. Each
    must have run before (compilation, caches) and must block until its result is there.
    """
    seconds = [np.zeros(repeats) for _ in calls]
    for repeat in range(repeats):
        for call, slots in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            slots[repeat] = time.perf_counter() - start
    return seconds


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of `compare_processes`.

    Attributes:
      name: for people.
      build: function of a module; gives for each task a function that runs it once, blocks until
        its result is there and tells what the result is ("" where there is nothing to tell).
      arguments: of `build`.
      keep_memory: with the memory setting of our commands (`common.io.memory`).
    """

    name: str
    build: Callable[..., dict[str, Callable[[], str]]]
    arguments: tuple[Any, ...]
    keep_memory: bool


def compare_processes(sides: Sequence[Side], tasks: dict[str, str], rounds: int) -> None:
    """Times each task on each side; prints best and median, and the last side's ratios to others.

    Each side is a process of its own; they take turns, so that other load on the machine meets all.

    Args:
      sides: the last one is ours.
      tasks: name -> title that is printed.
      rounds: turns of each side.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in sides:
        pipes[side.name], theirs = context.Pipe()
        arguments = (side, list(tasks), theirs)
        processes.append(context.Process(target=_serve, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[side.name].recv()  # one after the other: compiling disturbs no measurement yet
    for task, title in tasks.items():
        seconds = {name: [] for name in pipes}
        found = {}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(task)
                taken, found[name] = pipe.recv()
                seconds[name].append(taken)
        print(f"{task}: {title}")
        _print_sides(seconds, found)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()


def _serve(side: Side, tasks: Sequence[str], pipe) -> None:
    """The process of a side: answers each task's name with seconds and result."""
    if side.keep_memory:
        keep_freed_memory()
    calls = side.build(*side.arguments)
    for task in tasks:  # compiles, and fills caches
        for _ in range(2):
            calls[task]()
    pipe.send("ready")
    for task in iter(pipe.recv, None):
        start = time.perf_counter()
        found = calls[task]()
        pipe.send((time.perf_counter() - start, found))


def _print_sides(seconds: dict[str, list[float]], found: dict[str, str]) -> None:
    width = max(map(len, seconds))
    for name, taken in seconds.items():
        line = f"  {name:{width}s} best {min(taken):.3f} s, median {np.median(taken):.3f} s"
        print(line + (f", {found[name]}" if found[name] else ""))
    *others, ours = seconds
    for name in others:
        best = min(seconds[ours]) / min(seconds[name])
        median = np.median(np.divide(seconds[ours], seconds[name]))
        print(f"  ratio {ours} / {name}: best {best:.2f}, median of turns {median:.2f}", flush=True)
