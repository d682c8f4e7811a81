"""Progress lines: losses, images per second, share of time waiting for data, time left."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

_Batch = TypeVar("_Batch")


class _Mark(NamedTuple):
    step: int
    time: float  # seconds of training, pauses taken out
    data_wait: float  # seconds, cumulative


class Progress:
    """Times the training loop. Host time only: it never waits for the device by itself.

    Call `step_done` after each step and `line` after fetching metrics (which waits for the device,
    so the times are the device's). The first step, which compiles, is left out of all rates;
    so is what runs under `pause` (checkpoints, evaluation). The time left extrapolates both the
    recent seconds per step and the pauses so far.

        for step in range(start_step, total_steps):
            with progress.data_wait():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            progress.step_done(step + 1)
            if (step + 1) % log_every == 0:
                print(progress.line(step + 1, to_host(metrics)))
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        num_devices: int,
        *,
        steps_per_epoch: int | None = None,
        window_seconds: float = 60.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock.

        Args:
          total_steps: of the whole run, resumed part included.
          batch_size: images of one global step.
          num_devices: of the whole run.
          steps_per_epoch: adds the epoch to the lines.
          window_seconds: rates are averages over the reports of so many last seconds, and over
            two reports at least.
          clock: seconds; tests pass their own.
        """
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._num_devices = num_devices
        self._steps_per_epoch = steps_per_epoch
        self._window_seconds = window_seconds
        self._clock = clock
        self._data_wait = 0.0
        self._paused = 0.0
        self._first: _Mark | None = None  # end of the first step
        self._paused_before_first = 0.0
        self._marks: collections.deque[_Mark] = collections.deque()

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Times the wait for the next batch."""
        start = self._clock()
        try:
            yield
        finally:
            self._data_wait += self._clock() - start

    def timed(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Yields the batches and times the wait for each."""
        end = object()
        while True:
            with self.data_wait():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Takes a checkpoint, an evaluation and the like out of the rates."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def step_done(self, step: int) -> None:
        """Says that `step` (counted from 1) was handed to the device."""
        if self._first is None:
            self._first = self._mark(step)
            self._paused_before_first = self._paused
            self._marks.append(self._first)

    def rates(self, step: int) -> dict[str, float]:
        """Rates of the last `window_seconds` up to `step`; empty before the second step.

        Returns:
          images_per_second, images_per_second_per_device, data_wait_share (0 to 1) and
          seconds_left.
        """
        if self._first is None or step <= self._first.step:
            if self._first is not None:
                # Metrics of the first step are here: it has not only been compiled, but run.
                self._first = self._mark(step)
                self._marks = collections.deque([self._first])
            return {}
        now = self._mark(step)
        if self._marks[-1].step < step:
            self._marks.append(now)
        while len(self._marks) > 2 and now.time - self._marks[1].time > self._window_seconds:
            self._marks.popleft()
        since = self._marks[0]
        seconds = max(now.time - since.time, 1e-9)
        steps = now.step - since.step
        images_per_second = steps * self._batch_size / seconds
        pause_per_step = (self._paused - self._paused_before_first) / (step - self._first.step)
        return {
            "images_per_second": images_per_second,
            "images_per_second_per_device": images_per_second / self._num_devices,
            "data_wait_share": min((now.data_wait - since.data_wait) / seconds, 1.0),
            "seconds_left": (self._total_steps - step) * (seconds / steps + pause_per_step),
        }

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """One line of the log, such as

        step 120/2000 (epoch 1.3)  loss 1.234  images/s 31.2 (7.8 per device)  data wait 3 %
        left 0:12:41
        """
        parts = [f"step {step}/{self._total_steps}"]
        if self._steps_per_epoch:
            parts[0] += f" (epoch {step / self._steps_per_epoch:.1f})"
        parts += [f"{name} {float(value):.4g}" for name, value in metrics.items()]
        rates = self.rates(step)
        if rates:
            parts += [
                f"images/s {rates['images_per_second']:.1f} "
                f"({rates['images_per_second_per_device']:.1f} per device)",
                f"data wait {100 * rates['data_wait_share']:.0f} %",
                f"left {_hours(rates['seconds_left'])}",
            ]
        return "  ".join(parts)

    def _mark(self, step: int) -> _Mark:
        return _Mark(step, self._clock() - self._paused, self._data_wait)


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
