"""Loaders that worker processes can import, without photos."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from common.data import remote
from common.data.photo_errors import PhotoErrors
from common.io.errors import UserError


class Numbers:
    """The example of slot n is n, and which process made it."""

    def __init__(self):
        self.photo_errors = PhotoErrors("skip")

    def fields(self, slot):
        return {"number": ((3,), np.int64), "process": ((), np.int64), "heavy": ((), np.bool_)}

    def load(self, slot, example):
        example["number"][:] = slot
        example["process"][()] = os.getpid()
        example["heavy"][()] = not {"jax", "tensorflow", "torch"}.isdisjoint(sys.modules)


class Failing(Numbers):
    """Slot `at` fails in a way."""

    def __init__(self, at, how):
        super().__init__()
        self._at, self._how = at, how

    def load(self, slot, example):
        super().load(slot, example)
        if slot != self._at:
            return
        if self._how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._how == "user":
            raise UserError(f"{slot}.jpg: found nothing, expected a photo")
        elif self._how == "busy":
            outcomes = [TimeoutError("busy"), None]
            remote.patiently(lambda: _next(outcomes), "gs://b/7.jpg", (TimeoutError,), abs)
        elif self._how == "mute":
            remote.repeated.add(1, time)  # a module, which no message can hold
        elif self._how == "odd":
            raise _OddError(slot, "odd")


def _next(outcomes):
    if (outcome := outcomes.pop(0)) is not None:
        raise outcome


class _OddError(Exception):
    """Cannot be pickled: it wants two arguments, and keeps one."""

    def __init__(self, slot, reason):
        super().__init__(f"slot {slot} is {reason}")


class Sleeping(Numbers):
    """Writes a file when it begins a slot of `first` or later, and never ends."""

    def __init__(self, folder, first=0):
        super().__init__()
        self._folder, self._first = folder, first

    def load(self, slot, example):
        super().load(slot, example)
        if slot < self._first:
            return
        Path(self._folder, str(os.getpid())).touch()
        time.sleep(1000)
