"""How the benches measure: sides in turns, in one process or in one each, and peak memory."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.io.memory import keep_freed_memory


def time_in_turns(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[np.ndarray]:
    """Returns the seconds of each call, (repeats,) per callable.

    The callables take turns, so that whatever else the machine does meets all of them alike. Each
    must have run before (compilation, caches) and must block until its result is there.
    """
    seconds = [np.zeros(repeats) for _ in calls]
    for repeat in range(repeats):
        for call, slots in zip(calls, seconds, strict=True):
            start = clock()
            call()
            slots[repeat] = clock() - start
    return seconds


def compare(
    title: str,
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Times callables in turns after one untimed call each; prints medians and ratios in one line.

    Args:
      title: printed first.
      sides: name -> callable as for `time_in_turns`; the first one is ours.
      repeats: timed calls of each.
      clock: `time.process_time` counts the processor time of all threads.
    """
    for call in sides.values():
        call()
    medians = [
        float(np.median(taken)) for taken in time_in_turns([*sides.values()], repeats, clock)
    ]
    columns = [f"{name} {1e3 * t:8.2f} ms" for name, t in zip(sides, medians, strict=True)]
    ratios = [f"ratio {medians[0] / other:.3f}" for other in medians[1:]]
    print(f"  {title:30s} {'   '.join(columns + ratios)}", flush=True)


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns, run in a new process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=keep_freed_memory) as pool:
        return pool.apply(function, arguments)


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of `compare_processes`.

    Attributes:
      name: printed.
      build: function of a module; returns for each task a function that runs it once, blocks until
        its result is there and describes the result ("" for nothing to print).
      arguments: of `build`.
      keep_memory: whether freed memory stays with the process (`common.io.memory`), as in our
        commands.
    """

    name: str
    build: Callable[..., dict[str, Callable[[], str]]]
    arguments: tuple[Any, ...]
    keep_memory: bool


def compare_processes(sides: Sequence[Side], tasks: dict[str, str], rounds: int) -> None:
    """Times each task on each side; prints best and median, and the last side's ratios to others.

    Each side is a process of its own. They take turns, so that other load on the machine meets all.

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
        pipes[side.name].recv()  # the next side starts when this one has compiled
    for task, title in tasks.items():
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        results: dict[str, str] = {}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(task)
                taken, results[name] = pipe.recv()
                seconds[name].append(taken)
        print(f"{task}: {title}")
        _print_sides(seconds, results)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()


def _serve(side: Side, tasks: Sequence[str], pipe: multiprocessing.connection.Connection) -> None:
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
        result = calls[task]()
        pipe.send((time.perf_counter() - start, result))


def _print_sides(seconds: dict[str, list[float]], results: dict[str, str]) -> None:
    width = max(map(len, seconds))
    for name, taken in seconds.items():
        line = f"  {name:{width}s} best {min(taken):.3f} s, median {np.median(taken):.3f} s"
        print(line + (f", {results[name]}" if results[name] else ""))
    *others, ours = seconds
    for name in others:
        best = min(seconds[ours]) / min(seconds[name])
        median = np.median(np.divide(seconds[ours], seconds[name]))
        print(f"  ratio {ours} / {name}: best {best:.2f}, median of turns {median:.2f}", flush=True)
