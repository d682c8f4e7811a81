"""Two processes of a training on this machine, which start in seconds.

Both are forked from a process that has imported what the command imports. The compiled programs
are kept in a folder. What is killed and measured is the command as it is.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.io.errors import UserError

PROCESSES = 2
CLASSES = ("even", "odd")
_server = multiprocessing.get_context("forkserver")


def prepare(module: str, programs: Path) -> None:
    """Before the first `Pair`: what the processes have imported, and where programs are kept."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs.absolute()))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    # TensorBoard's events need the last one, which is not installed everywhere.
    _server.set_forkserver_preload([module, "clu.metric_writers"])


def write_photos(folder: Path, count: int = 24) -> None:
    """Class folders of small random photos, the data of `tiny_classifier`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        split = "validation" if number % 6 < 2 else "train"
        path = folder / split / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)


def tiny_classifier(steps: int, every_steps: int) -> list[str]:
    """Flags of detection.pretrain: a training whose steps take milliseconds.

    Args:
      steps: of the training.
      every_steps: from one checkpoint to the next.
    """
    fields = {
        "data.image_size": 32,
        "data.batch_size": 4,
        "data.num_threads": 1,
        "model.norm": "group",
        "model.dtype": "float32",
        "optimizer.num_steps": steps,
        "evaluation.batch_size": 4,
        "evaluation.every_epochs": 5,
        "checkpoint.every_steps": every_steps,
        "log.every_steps": 1,
    }
    return [
        "--config=configs/pretrain/resnet50.py:resnet10",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


class Pair:
    """One start of a command in two processes."""

    def __init__(
        self,
        module: str,
        workdir: Path,
        arguments: Sequence[str],
        own_arguments: Sequence[Sequence[str]] = ((), ()),
    ):
        """Starts them.

        Args:
          module: of the command.
          workdir: of the run; gets their output, log.txt.
          arguments: of both.
          own_arguments: of each.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self.log = workdir, workdir / "log.txt"
        self._joined_before = self._joins()
        self.processes = []
        for index, own in enumerate(own_arguments):
            variables = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(PROCESSES),
                "JAX_PROCESS_ID": str(index),
            }
            words = [f"--workdir={workdir}", *arguments, *own]
            process = _server.Process(target=_run, args=(module, words, variables, self.log))
            process.start()
            self.processes.append(process)

    @property
    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def _joins(self) -> int:
        return self.log.read_text(errors="replace").count("devices: ") if self.log.exists() else 0

    @property
    def joined(self) -> bool:
        """Whether the processes have found each other."""
        return self._joins() > self._joined_before

    def lines(self) -> int:
        """Lines of the metrics so far."""
        path = self.workdir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())

    def send(self, number: int, which: Sequence[int]) -> None:
        """Sends a signal to those of the processes that still run."""
        for index in which:
            pid = self.processes[index].pid
            if self.processes[index].is_alive() and pid is not None:
                os.kill(pid, number)

    def wait(self, seconds: float, which: Sequence[int] = (0, 1)) -> list[int]:
        """Exit statuses of those that are asked for.

        Raises:
          UserError: one of them hangs; all are killed.
        """
        deadline = time.monotonic() + seconds
        for index in which:
            self.processes[index].join(max(deadline - time.monotonic(), 0.01))
        statuses = [self.processes[index].exitcode for index in which]
        if None in statuses:
            for process in self.processes:
                process.kill()
            raise UserError(f"{self.log}: a process hangs after {seconds:.0f} s")
        return [status for status in statuses if status is not None]


def _run(module: str, arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """`python -m MODULE` in a forked process."""
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [module, *arguments]
    del sys.modules[module]  # its imports stay
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # a forked process ends without them
