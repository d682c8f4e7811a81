"""A work directory belongs to one training at a time; what a dead one left is not in the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from common.io.errors import UserError
from common.training.workdir_lock import workdir_lock
from tests.remote import use_fake_store

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from etils import epath
from common.training.workdir_lock import workdir_lock
with workdir_lock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError) as error, workdir_lock(epath.Path(tmp_path)):
        pass
    text = str(error.value)
    assert f"{tmp_path}: a training runs here already (process {first.pid} on " in text
    assert " since 20" in text and "\n" not in text
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with workdir_lock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / "lock").read_text())["host"]
    with workdir_lock(epath.Path(tmp_path)):  # free again
        pass


def test_in_an_object_store_a_lock_that_beats_is_in_use_and_a_still_one_is_stale(
    monkeypatch, tmp_path
):
    use_fake_store(monkeypatch, tmp_path)
    workdir = epath.Path("gs://bucket/run")
    said = []
    with workdir_lock(workdir, beat_seconds=0.05):
        with (
            pytest.raises(UserError, match="a training runs here already"),
            workdir_lock(workdir, beat_seconds=0.2, say=lambda text, **_: said.append(text)),
        ):
            pass
    assert "waiting for a sign of life" in said[0]
    assert not (workdir / "lock").exists()
    (workdir / "lock").write_text('{"host": "a", "process": 1, "since": "b", "beat": 7}')
    start = time.monotonic()
    with workdir_lock(workdir, beat_seconds=0.05, say=lambda *_, **__: None):
        assert time.monotonic() - start > 0.1
