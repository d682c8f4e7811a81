"""Reads of remote files are repeated while the storage is busy, and counted."""

import pytest

from common.data import remote


def reads(*outcomes):
    left = list(outcomes)

    def read():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return read


def test_a_busy_storage_is_asked_again_later_and_later(capfd):
    before, waits = remote.repeated.count, []
    read = reads(TimeoutError("busy"), TimeoutError("busy"), b"photo")
    assert remote.patiently(read, "gs://b/1.jpg", (TimeoutError,), waits.append) == b"photo"
    assert remote.repeated.count == before + 2
    assert 0.25 <= waits[0] < 0.75 and 0.5 <= waits[1] < 1.5
    assert capfd.readouterr().err.count("gs://b/1.jpg: read again") == (before == 0)


def test_what_does_not_pass_is_raised_at_once_or_in_the_end():
    waits = []
    with pytest.raises(FileNotFoundError):
        remote.patiently(reads(FileNotFoundError()), "gs://b", (TimeoutError,), waits.append)
    assert not waits
    with pytest.raises(TimeoutError):
        busy = reads(*[TimeoutError("busy")] * 6)
        remote.patiently(busy, "gs://b", (TimeoutError,), waits.append)
    assert len(waits) == 5
