import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.io.endings import say_error

ROOT = Path(__file__).parents[3]
PROGRAM = """
from common.io.commands import run_main
from common.io.errors import Stopped, UserError

def main():
    print("step 7")
    raise {error}

run_main(main)
"""


def test_an_error_that_cannot_be_written_is_dropped(monkeypatch):
    with open("/dev/full", "w") as stdout, open("/dev/full", "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        print("step 7")
        say_error("photos/7.jpg: cannot read the image")
        print("what follows", flush=True)
        nowhere = os.stat(os.devnull)
        for stream in (stdout, stderr):
            assert os.path.samestat(os.fstat(stream.fileno()), nowhere)


def test_an_error_comes_after_what_was_printed(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(sys, "stderr", log)
        print("step 7")
        say_error("disk full")
        assert (tmp_path / "log").read_text() == "step 7\nerror: disk full\n"


@pytest.mark.parametrize(("error", "status"), [("Stopped('SIGTERM')", 75), ("UserError('x')", 1)])
def test_a_log_on_a_full_disk_changes_no_exit_status(error, status):
    program = [sys.executable, "-c", PROGRAM.format(error=error)]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(program, cwd=ROOT, env=buffered, stdout=full, stderr=full)
    assert ended.returncode == status
