"""Stops a run that diverged, and shows where a run hangs, which it ends in the end."""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from common.io import activity
from common.io.endings import EXIT_AGAIN, say_error
from common.io.errors import UserError
from common.training import distributed
from common.training.settings import LogSettings

_MAX_IDS = 32  # image ids spelled out in an error


class TrainingDiverged(UserError):
    """A loss or gradient norm is not finite."""


def check_finite(metrics: Mapping[str, float], step: int, image_ids: Sequence[str]) -> None:
    """Stops the run at the first value that is NaN or infinite.

    Args:
      metrics: loss terms, gradient norm and so on, already on the host.
      step: that the values belong to.
      image_ids: of this process's images in that step.

    Raises:
      TrainingDiverged: naming each bad term, the step and the image ids.
    """
    bad = {name: float(v) for name, v in metrics.items() if not math.isfinite(float(v))}
    if not bad:
        return
    terms = ", ".join(f"{name} = {value}" for name, value in bad.items())
    ids = ", ".join(str(i) for i in image_ids[:_MAX_IDS])
    if len(image_ids) > _MAX_IDS:
        ids += f" and {len(image_ids) - _MAX_IDS} more"
    raise TrainingDiverged(
        f"training diverged at step {step}: {terms}; image ids: {ids or 'unknown'}. "
        "Look at these images, or lower the learning rate, warm up longer or clip gradients; "
        "the same command goes on from the last checkpoint."
    )


class MetricsCheck:
    """Fetches the metrics of each step, and stops the run at the first one that is not finite.

    Fetching waits for the devices. So the metrics of a step are looked at one step later, while the
    devices already work on the next one; only a report or a checkpoint asks for the latest.
    """

    def __init__(self, image_name: Callable[[int], str]):
        """`image_name`: of an index of the batches, for the error."""
        self._image_name = image_name
        self._latest: tuple[int, Mapping[str, Any], np.ndarray] | None = None

    def one_behind(self, step: int, metrics: Mapping[str, Any], indices: np.ndarray) -> None:
        """Looks at the step before; the metrics of this one are looked at in the next call.

        Args:
          step: that was handed to the devices.
          metrics: of it, on the devices.
          indices: of this process's images in its batch, -1 for padding.

        Raises:
          TrainingDiverged: see `check_finite`.
        """
        if self._latest is not None:
            self.latest()
        self._latest = (step, metrics, indices)

    def latest(self) -> dict[str, float]:
        """The figures of the latest step, once it is done; errors as `one_behind`."""
        assert self._latest is not None, "no step yet"
        step, metrics, indices = self._latest
        figures = {name: float(value) for name, value in distributed.to_host(metrics).items()}
        check_finite(figures, step, [self._image_name(i) for i in indices if i >= 0])
        return figures


class StallWatchdog:
    """Prints the stacks of all threads when nothing was finished for a while, and ends a dead run.

    The usual reason is an input file system that stopped answering. It hears of each step and batch
    by `common.io.activity`. Compiling counts as none, so choose a longer time.

        with StallWatchdog.of(settings.log):
            for step in ...:
                ...
                progress.step_done(step)
    """

    def __init__(
        self,
        seconds: float,
        abort_after: int = 0,
        file: TextIO | None = None,
        abort: Callable[[float], Any] | None = None,
    ):
        """`seconds` without a step before stacks are printed; 0 turns the watchdog off.

        Args:
          seconds: see above.
          abort_after: so many times `seconds` without a step or batch end the run; 0: none do.
          file: with a file descriptor, default the process's stderr.
          abort: called with the seconds instead of ending the run.
        """
        self._seconds = seconds
        self._abort_after = abort_after
        self._file = file or sys.__stderr__ or sys.stderr
        self._abort = abort or _end_stalled
        self._ended = contextlib.ExitStack()

    @classmethod
    def of(cls, log: LogSettings) -> "StallWatchdog":
        """That of a run."""
        return cls(log.stall_seconds, log.abort_after_stalls)

    def __enter__(self) -> "StallWatchdog":
        if self._seconds <= 0:
            return self
        self._ended.callback(faulthandler.cancel_dump_traceback_later)
        self._ended.enter_context(activity.heard(self._start_anew))
        self._start_anew()
        if self._abort_after:
            left = threading.Event()
            self._ended.callback(left.set)
            threading.Thread(target=self._watch, args=(left,), name="stalls", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.close()

    def _start_anew(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def _watch(self, left: threading.Event) -> None:
        limit = self._seconds * self._abort_after
        start = time.monotonic()
        while not left.wait(min(limit / 4, 5.0)):
            _, idle = activity.current()
            idle = min(idle, time.monotonic() - start)
            if idle > limit:
                self._abort(idle)


def _end_stalled(seconds: float) -> None:
    team = distributed.team()
    if team is not None:
        team.stalled(seconds)
        return
    doing, _ = activity.current()
    if doing.what in activity.PATIENT:
        return
    what = doing.what or "in a step"
    say_error(f"{what}: no step finished for {seconds:.0f} s after step {doing.step}")
    os._exit(EXIT_AGAIN)
