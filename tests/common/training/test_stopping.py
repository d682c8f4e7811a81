"""Signals end a training after the step under way, and one that is repeated at once."""

import signal

import pytest

from common.training.stopping import StopRequests


def test_a_signal_asks_to_stop_and_ends_with_its_status():
    said = []
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests(lambda text, **_: said.append(text)) as stop:
        assert not stop.requested(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested(2)
        with pytest.raises(SystemExit) as ended:
            stop.leave(2)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopping after this step" in said[0]
    assert said[1] == "stopped at step 2; the same command goes on from there"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_does_not_wait():
    with StopRequests(lambda *_, **__: None) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
