"""Two real processes that step together, one of which fails, stalls, dies or is told to stop."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.common.training.test_distributed import start

pytestmark = pytest.mark.multiprocess
SECONDS = 20  # from the failure to the last exit

PROGRAM = """
import atexit, os, signal, sys, time
import jax, numpy as np
from common.io.commands import run_main
from common.io.progress import Progress
from common.training import command, distributed, preemption
from common.training.checkpoint import Checkpoints
from common.training.watchdog import StallWatchdog

workdir, what = sys.argv[1:]
del sys.argv[1:]

def batches(process):
    for step in range(20 if what == "ends" else 100000):
        if process == 1 and step == 5 and what == "sleeps":
            time.sleep(1000)
        time.sleep(0.02)
        yield np.full((1,), step, np.float32)

def main():
    if what == "ends" and os.environ["JAX_PROCESS_ID"] == "1":  # after our end, before that of JAX
        atexit.register(os.kill, os.getpid(), signal.SIGKILL)
    mesh, say = command.start()
    process = jax.process_index()
    print("host", process, flush=True)
    add = jax.jit(lambda state, x: state + x.sum(), out_shardings=distributed.replicated(mesh))
    state = distributed.replicate(np.float32(0), mesh)
    checkpoints = Checkpoints(workdir)
    progress = Progress(0)
    step = 0
    def save():
        checkpoints.save(step, {"params": {"w": state}, "batch_stats": {}}, {}, wait=True)
    stalls = int(what == "sleeps")
    with StallWatchdog(8.0, abort_after=stalls), preemption.saving(save):
        for step, batch in enumerate(progress.timed(batches(process)), start=1):
            state = add(state, distributed.to_global({"x": batch}, mesh)["x"])
            progress.step_done(step)
            jax.block_until_ready(state)
            if step == 10:
                print("ten", flush=True)
            preemption.passes()

run_main(main)
"""


class Pair:
    """Two processes, their output in files."""

    def __init__(self, folder: Path, what: str):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        outputs = [folder / "out0", "/dev/full" if what == "cannot write" else folder / "out1"]
        self.files = [open(path, "w") for path in outputs]
        self.processes = [
            start(
                PROGRAM,
                {
                    "JAX_NUM_CPU_DEVICES": "1",
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(i),
                },
                folder / "checkpoints",
                what,
                output=self.files[i],
            )
            for i in range(2)
        ]

    def output(self, index: int) -> str:
        return (self.folder / f"out{index}").read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 240
        while not all(text in self.output(i) for i in range(2)):
            assert time.monotonic() < deadline, self.output(0) + self.output(1)
            time.sleep(0.05)

    def ends(self, seconds: float) -> list[int]:
        """The exit statuses of the processes, which end within so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output(0) + self.output(1)) from None

    def kill(self) -> None:
        for process, file in zip(self.processes, self.files, strict=True):
            process.kill()
            process.wait()
            file.close()


@pytest.fixture
def pair(tmp_path, request):
    pair = Pair(tmp_path, request.param)
    yield pair
    pair.kill()


HOST = socket.gethostname()


@pytest.mark.parametrize("pair", ["sleeps"], indirect=True)
def test_one_that_waits_for_its_input_ends_both_by_name(pair):
    pair.wait_for("host")
    assert pair.ends(SECONDS + 60) == [75, 75]
    reason = f"process 1 ({HOST}) is waiting for input: no step finished for"
    assert reason in pair.output(0)


@pytest.mark.parametrize("pair", ["runs"], indirect=True)
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_ends_the_other_by_name(pair, killed):
    pair.wait_for("ten")
    begin = time.monotonic()
    pair.processes[killed].kill()
    other = pair.ends(SECONDS)[1 - killed]
    assert time.monotonic() - begin < SECONDS
    assert other == 75 or (killed == 0 and other != 0)
    said = pair.output(1 - killed)
    # Of the end of process 0, JAX's own client may be the first to tell.
    assert f"process {killed} ({HOST})" in said or (killed == 0 and "leader" in said), said


@pytest.mark.parametrize("pair", ["ends"], indirect=True)
def test_the_death_of_one_that_has_ended_does_not_keep_the_other(pair):
    pair.wait_for("ten")
    assert pair.ends(SECONDS + 5) == [-signal.SIGABRT, -signal.SIGKILL]


@pytest.mark.parametrize("pair", ["cannot write"], indirect=True)
def test_one_whose_log_is_on_a_full_disk_ends_both_by_name(pair):
    assert pair.ends(240) == [1, 1]
    assert f"process 1 ({HOST}) failed: [Errno 28] No space left" in pair.output(0)


@pytest.mark.parametrize("pair", ["runs"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_saves_one_checkpoint_and_both_say_start_again(pair, tmp_path, number):
    pair.wait_for("ten")
    pair.processes[1].send_signal(number)
    assert pair.ends(60) == [75, 75], pair.output(0) + pair.output(1)
    for i in range(2):
        assert f"stopped by {number.name} at process 1 ({HOST})" in pair.output(i)
    steps = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
    assert len(steps) == 1 and int(steps[0].name) > 10
