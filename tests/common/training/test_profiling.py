"""Traces of chosen steps, and of those that a signal asks for."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from common.training import profiling
from common.training.profiling import Profiler


@pytest.fixture
def calls(monkeypatch):
    """What is asked of `jax.profiler`."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(profiler, calls, first, last):
    for step in range(first, last + 1):
        profiler.before(step)
        calls.append(f"{step}")
        profiler.after(step, ())


def quiet(*_, **__):
    pass


def test_the_steps_of_the_config_are_traced_once(calls, tmp_path):
    with Profiler(tmp_path, (3, 4), quiet) as profiler:
        run(profiler, calls, 1, 6)
    assert calls == ["1", "2", "start", "3", "4", "stop", "5", "6"]


def test_a_run_that_goes_on_within_them_traces_the_rest_and_one_that_ends_stops(calls, tmp_path):
    with Profiler(tmp_path, (3, 9), quiet) as profiler:
        run(profiler, calls, 5, 6)
    assert calls == ["start", "5", "6", "stop"]


def test_a_signal_traces_the_next_steps(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "SIGNAL_STEPS", 2)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Profiler(tmp_path, (), quiet) as profiler:
            run(profiler, calls, 1, 1)
            os.kill(os.getpid(), signal.SIGUSR1)
            run(profiler, calls, 2, 4)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == ["1", "start", "2", "3", "stop", "4"]


def test_a_trace_has_a_file_of_this_host(tmp_path):
    said = []
    with Profiler(tmp_path, (1, 1), lambda text, **_: said.append(text)) as profiler:
        profiler.before(1)
        profiler.after(1, jnp.ones(3) + 1)
    assert list(tmp_path.rglob("*.xplane.pb")) and "trace in" in said[0]
