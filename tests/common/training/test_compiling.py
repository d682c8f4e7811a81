"""What is being compiled is said, once for each program."""

import time

import jax
import numpy as np

from common.training.compiling import announced, compiling


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
