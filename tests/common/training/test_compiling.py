"""What is being compiled is said, once for each program."""

import os
import subprocess
import sys
import time

import jax
import numpy as np

from common.training import distributed
from common.training.compiling import announced, compiled_together, compiling


def test_each_canvas_is_announced_once():
    said = []
    jitted = jax.jit(lambda state, batch: state + batch["image"].sum())
    batches = [{"image": np.zeros((2, *size, 3))} for size in ((4, 6), (6, 4), (4, 6))]
    for _ in range(2):  # a second evaluation wraps the same function again
        step = announced(jitted, "training step", lambda text, **_: said.append(text))
        for batch in batches:
            step(1.0, batch)
    assert [text for text in said if "compiling" in text] == [
        "compiling the training step for 2 images of 4x6 ...",
        "compiling the training step for 2 images of 6x4 ...",
    ]
    assert sum(text.startswith("compiled in ") for text in said) == 2


def test_a_long_compilation_says_that_it_goes_on():
    said = []
    with compiling("detector", lambda text, **_: said.append(text), every_seconds=0.02):
        time.sleep(0.1)
    assert sum("still compiling the detector" in text for text in said) >= 2


def test_a_step_of_more_arguments_is_announced_too():
    said = []
    jitted = jax.jit(lambda key, batch, flip: key + batch["image"].sum() + flip)
    step = announced(jitted, "detector", lambda text, **_: said.append(text))
    for flip in (False, True):
        assert float(step(1.0, {"image": np.ones((1, 2, 2, 3))}, flip)) == 13 + flip
    assert [text for text in said if "compiling" in text] == [
        "compiling the detector for 1 images of 2x2 ..."
    ]


def test_no_process_steps_before_all_have_compiled(monkeypatch):
    happened = []
    jitted = jax.jit(lambda state, batch, rate: state + rate * batch["image"].sum())

    class Step:
        def lower(self, *arguments):
            happened.append("compiles")
            return jitted.lower(*arguments)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda name: happened.append("waits"))
    step = compiled_together(Step())
    for size, expected in ((2, 9.0), (3, 19.0), (2, 9.0)):
        batch = {"image": np.ones((1, size, size, 1), np.float32)}
        assert float(step(np.float32(1), batch, np.float32(2))) == expected
    assert happened == 2 * ["compiles", "waits"]


def test_the_alarm_of_xla_is_silent_unless_a_user_wants_it():
    """It would take a compilation of two minutes, which `compiling` tells of, for an error."""
    code = "import os, detection; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    for given, level in (({}, "3"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")):
        clean = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=clean | given, capture_output=True, text=True
        )
        assert done.stdout.strip() == level, done.stderr
