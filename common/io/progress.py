"""The progress line of every long command: how much is done, figures, rate, time left."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from common.io import activity

_Batch = TypeVar("_Batch")


class _Mark(NamedTuple):
    step: float
    time: float  # seconds of training, pauses taken out
    data_wait: float  # seconds, cumulative
    flops: float  # of one device, cumulative


class Progress:
    """Times a long loop. Host time only: it never waits for the device by itself.

    A loop over many small items reports each; a line is said every few seconds:

        progress = Progress(len(images), what="merge")
        for done, image in enumerate(images, start=1):
            ...
            progress.report(done, {"rows": rows})

    A training loop calls `step_done` after each step and `line` after fetching metrics (which waits
    for the device, so the times are the device's):

        for step in range(start_step, num_steps):
            with progress.data_wait():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            progress.step_done(step + 1)
            if (step + 1) % log_every == 0:
                print(progress.line(step + 1, to_host(metrics)))

    The first step, which compiles, is left out of all rates; so is what runs under `pause`
    (checkpoints, evaluation). The time left extrapolates both the recent seconds per step and the
    pauses so far.
    """

    def __init__(
        self,
        total: int,
        batch_size: int = 1,
        num_devices: int | None = None,
        *,
        what: str = "step",
        unit: str = "images",
        steps_per_epoch: int | None = None,
        peak_flops: float | None = None,
        say: Callable[[str], None] = print,
        every_seconds: float = 10.0,
        window_seconds: float = 60.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock.

        Args:
          total: steps of the whole run, resumed part included; 0 where it is not known.
          batch_size: units of one step (of all devices).
          num_devices: of the whole run; the lines then give the rate of one device, too.
          what: begins the line.
          unit: what the rate counts.
          steps_per_epoch: adds the epoch to the lines.
          peak_flops: of one device in a second; adds the share of it that is reached (MFU).
          say: where `report` puts lines.
          every_seconds: time between two lines of `report`.
          window_seconds: rates are averages over the reports of so many last seconds, and over
            two reports at least.
          clock: seconds; tests pass their own.
        """
        self._total = total
        self._batch_size = batch_size
        self._num_devices = num_devices
        self._what, self._unit = what, unit
        self._steps_per_epoch = steps_per_epoch
        self._peak_flops = peak_flops
        self._flops = 0.0
        self._say = say
        self._every_seconds = every_seconds
        self._window_seconds = window_seconds
        self._clock = clock
        self._said = clock()
        self._times_data = False
        self._data_wait = 0.0
        self._paused = 0.0
        self._first: _Mark | None = None  # end of the first step
        self._paused_before_first = 0.0
        self._marks: collections.deque[_Mark] = collections.deque()

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Times the wait for the next batch."""
        self._times_data = True
        start = self._clock()
        try:
            with activity.doing(activity.INPUT):
                yield
        finally:
            self._data_wait += self._clock() - start

    def timed(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Yields the batches and times the wait for each."""
        while True:
            with self.data_wait():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Takes a checkpoint, an evaluation and the like (of `activity`) out of the rates."""
        start = self._clock()
        try:
            with activity.doing(what):
                yield
        finally:
            self._paused += self._clock() - start

    def report(
        self, done: float, figures: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        """Says a line when the last one is `every_seconds` old, or when this is the last."""
        self.step_done(done)
        if last or self._clock() - self._said >= self._every_seconds:
            self._said = self._clock()
            self._say(self.line(done, figures or {}))
            sys.stdout.flush()

    def step_done(self, step: float, flops: float = 0.0) -> None:
        """Says that `step` (counted from 1), `flops` a device, was handed to the devices."""
        activity.step_done(step)
        self._flops += flops
        if self._first is None:
            self._first = self._mark(step)
            self._paused_before_first = self._paused
            self._marks.append(self._first)

    def rates(self, step: float) -> dict[str, float]:
        """Rates of the last `window_seconds` up to `step`; empty before the second step.

        Returns:
          images_per_second, images_per_second_per_device, data_wait_share (0 to 1) and
          seconds_left; mfu (0 to 1) where the devices' peak is known.
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
        data_wait_share = min((now.data_wait - since.data_wait) / seconds, 1.0)
        activity.data_wait(data_wait_share)
        pause_per_step = (self._paused - self._paused_before_first) / (step - self._first.step)
        rates = {
            "images_per_second": images_per_second,
            "images_per_second_per_device": images_per_second / (self._num_devices or 1),
            "data_wait_share": data_wait_share,
            "seconds_left": (self._total - step) * (seconds / steps + pause_per_step),
        }
        if self._peak_flops:
            rates["mfu"] = (now.flops - since.flops) / seconds / self._peak_flops
        return rates

    def line(self, step: float, figures: Mapping[str, float]) -> str:
        """One line of the log, such as

        step 120/2000 (epoch 1.3)  loss 1.234  images/s 31.2 (7.8 per device)  data wait 3 %
        left 0:12:41
        """
        parts = [f"{self._what} {step:.0f}" + (f"/{self._total:.0f}" if self._total else "")]
        if self._steps_per_epoch:
            parts[0] += f" (epoch {step / self._steps_per_epoch:.1f})"
        parts += [f"{name} {_short(value)}" for name, value in figures.items()]
        rates = self.rates(step)
        if rates:
            parts.append(self._rate(rates))
            if self._times_data:
                parts.append(f"data wait {100 * rates['data_wait_share']:.0f} %")
            if "mfu" in rates:
                parts.append(f"MFU {100 * rates['mfu']:.1f} %")
            if self._total:
                parts.append(f"left {_hours(rates['seconds_left'])}")
        return "  ".join(parts)

    def _rate(self, rates: Mapping[str, float]) -> str:
        rate = rates["images_per_second"]
        if self._num_devices is not None:
            each = rates["images_per_second_per_device"]
            return f"{self._unit}/s {rate:.1f} ({each:.1f} per device)"
        if rate < 1:
            return f"{self._unit}/hour {3600 * rate:.0f}"
        return f"{self._unit}/s {rate:.{0 if rate >= 100 else 1}f}"

    def _mark(self, step: float) -> _Mark:
        return _Mark(step, self._clock() - self._paused, self._data_wait, self._flops)


def _short(value: float) -> str:
    """Counts in full, other figures with four digits."""
    return str(value) if isinstance(value, int) else f"{float(value):.4g}"


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
