"""Traces of some training steps, for TensorBoard's profiler or https://ui.perfetto.dev.

`config.log.profile_steps=(first, last)` names the steps. `kill -USR1 PROCESS` traces the next ones
of that process. Traces lie in WORKDIR/profile/plugins/profile/TIME, a file a host.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

SIGNAL_STEPS = 10  # that a signal asks for


class Profiler:
    """Starts and ends `jax.profiler`; a trace covers whole steps.

    with Profiler(folder, settings.log.profile_steps, say) as profiler:
        for step in ...:
            profiler.before(step)
            ...
            profiler.after(step, metrics)
    """

    def __init__(self, folder: os.PathLike, steps: Sequence[int], say: Callable):
        """`steps`: the first and the last one to trace, or ()."""
        self._folder, self._say = os.fspath(folder), say
        self._steps = tuple(steps)
        self._asked = False
        self._last: int | None = None  # step of the trace that is under way

    def __enter__(self) -> "Profiler":
        # Python takes signals in the main thread alone; tests may train in another one.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._last is not None:
            self._stop()

    def _ask(self, *_) -> None:
        self._asked = True

    def before(self, step: int) -> None:
        """Starts a trace that is due."""
        if self._last is not None:
            return
        if self._steps and self._steps[0] <= step <= self._steps[1]:
            self._last = self._steps[1]
        elif self._asked:
            self._last = step + SIGNAL_STEPS - 1
        else:
            return
        self._asked = False
        jax.profiler.start_trace(self._folder)

    def after(self, step: int, results: Any) -> None:
        """Ends a trace whose last step gave `results`, which are waited for."""
        if self._last is not None and step >= self._last:
            jax.block_until_ready(results)
            self._stop()
            self._say(f"step {step}  trace in {self._folder}", flush=True)

    def _stop(self) -> None:
        self._last = None
        jax.profiler.stop_trace()
