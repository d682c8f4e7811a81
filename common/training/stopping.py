"""Ctrl-C and SIGTERM end a training after the step that is under way, with its state saved."""

import os
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Catches the signals inside a `with` block; a second Ctrl-C ends the process at once.

    With several processes it is enough that one of them is told by SIGTERM, as a host is that will
    be taken away: all of them stop after the same step.

        with StopRequests(say) as stop:
            for step in ...:
                ...
                if stop.requested(step):
                    checkpoints.save(...)
                    stop.leave(step)
    """

    def __init__(self, say: Callable = print):
        self._say = say
        self._signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS[:1] if jax.process_count() > 1 else _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: object) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        name = signal.Signals(number).name
        self._say(f"{name}: stopping after this step, once its state is saved", flush=True)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; all processes ask after each step, and agree."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def leave(self, step: int) -> None:
        """Ends the process with the status of its signal."""
        number = self._signal or signal.SIGTERM
        self._say(f"stopped at step {step}; the same command goes on from there", flush=True)
        raise SystemExit(128 + number)
