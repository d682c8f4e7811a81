"""Says when a program is being compiled, which takes minutes in which nothing else is said."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from common.io import activity
from common.training import distributed

_EVERY_SECONDS = 60.0
# Image shapes that each compiled function has seen, so that a second evaluation says nothing.
_seen: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


def announce_canvases(canvases: Iterable[tuple[int, int]], say: Callable) -> None:
    """Names the programs that a training will compile, one for each (height, width)."""
    names = ", ".join(f"{height}x{width}" for height, width in canvases)
    say(f"programs: one for each canvas, {names}; compiled when it first comes", flush=True)


def announced(step: Callable, what: str, say: Callable = print) -> Callable:
    """The jitted `step`, which says its compilations; one argument is a batch with an "image".

    Args:
      step: compiles when it is called with an image shape that is new to it, once for each canvas.
      what: it is, such as "training step".
      say: where lines go.
    """
    shapes = _seen.setdefault(step, set())

    def call(*arguments: Any) -> Any:
        batch = next(a for a in arguments if isinstance(a, Mapping) and "image" in a)
        shape = tuple(batch["image"].shape)
        if shape in shapes:
            return step(*arguments)
        shapes.add(shape)
        with compiling(f"{what} for {shape[0]} images of {shape[1]}x{shape[2]}", say):
            return step(*arguments)

    return call


def compiled_together(step: Any, programs: dict[Any, Callable] | None = None) -> Callable:
    """The jitted `step(state, batch, learning_rate)`, which no process calls before all have it.

    On CPUs the first sum over processes waits half a minute at most. In that time process 0 may
    have found its program in the compile cache while the others still compile: there (not on GPUs
    and TPUs) JAX 0.10's cache key takes in the process itself, and process 0 alone writes.

    Args:
      step: as `common.training.step.jit_train_step` gives it.
      programs: by `program_kind`, that all processes have compiled already.
    """
    if programs is None and jax.process_count() == 1:
        return step
    programs = {} if programs is None else programs

    def call(state: Any, batch: Mapping[str, Any], learning_rate: Any) -> Any:
        kind = program_kind(batch)
        if kind not in programs:
            programs[kind] = step.lower(state, batch, learning_rate).compile()
            distributed.barrier("compiled")
        return programs[kind](state, batch, learning_rate)

    return call


def compiled_ahead(
    step: Any, state: Any, batches: Iterable[Mapping[str, Any]], what: str, say: Callable = print
) -> Callable:
    """`compiled_together`, with the programs for all batches that will come compiled now.

    Args:
      step: as `common.training.step.jit_train_step` gives it.
      state: that it will be called with, or its shapes.
      batches: shapes of the fields of each kind of batch, of all devices.
      what: it is, such as "training step".
      say: where lines go.
    """
    programs, rate = {}, jax.ShapeDtypeStruct((), jnp.float32)
    for batch in batches:
        shape, about = batch["image"].shape, "" if "gt_boxes" in batch else " with labels only"
        with compiling(f"{what} for {shape[0]} images of {shape[1]}x{shape[2]}{about}", say):
            programs[program_kind(batch)] = step.lower(state, dict(batch), rate).compile()
    distributed.barrier("compiled")
    return compiled_together(step, programs)


def program_kind(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the programs of a run apart: the image shape and the names of the fields."""
    return tuple(batch["image"].shape), frozenset(batch)


@contextlib.contextmanager
def compiling(what: str, say: Callable, every_seconds: float = _EVERY_SECONDS) -> Iterator[None]:
    """Says that the block compiles, that it still does from time to time, and how long it took."""
    start, ended = time.monotonic(), threading.Event()
    say(f"compiling the {what} ...", flush=True)

    def remind() -> None:
        while not ended.wait(every_seconds):
            say(f"still compiling the {what}, {time.monotonic() - start:.0f} s", flush=True)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        with activity.doing(activity.COMPILING):
            yield
    finally:
        ended.set()
        thread.join()
    say(f"compiled in {time.monotonic() - start:.1f} s", flush=True)
