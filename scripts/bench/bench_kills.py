"""Ends trainings of two processes at random, goes on, and compares with the uninterrupted run.

    python -m scripts.bench.bench_kills --kills=100 --workdir=WORK -- \\
        --config=CONFIG --config.data.dir=DIR [further flags of detection.train]

One run goes uninterrupted. Then runs are started, ended at a random moment and started again until
they are done, as often as it takes for --kills kills: SIGKILL or SIGTERM, to one process or to
both, anywhere between start and end, or while a checkpoint is being written. Each finished run must
have the losses, evaluations and final parameters of the first one, bit for bit. With few steps and
a checkpoint every few (--config.checkpoint.every_steps) a kill costs about one start.
"""

import collections
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.training.checkpoint import Checkpoints
from common.training.checkpoint_items import flatten

PROCESSES = 2
_LAST_EXIT = 120.0  # seconds after which a process counts as hanging
_START = 600.0
_PASSED_ON: list[str] = []  # flags of detection.train


class Run:
    """The processes of one start of the command."""

    def __init__(self, workdir: Path, arguments: list[str]):
        self.workdir = workdir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "detection.train", f"--workdir={workdir}", *arguments]
        workdir.mkdir(parents=True, exist_ok=True)
        self.log = (workdir / "log.txt").open("a")
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ
                | {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(PROCESSES),
                    "JAX_PROCESS_ID": str(index),
                },
                stdout=self.log,
                stderr=self.log,
            )
            for index in range(PROCESSES)
        ]

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def steps(self) -> int:
        """Lines of the metrics so far."""
        path = self.workdir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses.

        Raises:
          UserError: a process hangs.
        """
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            for process in self.processes:
                process.kill()
            raise UserError(f"{self.log.name}: a process hangs after {seconds:.0f} s") from error
        finally:
            self.log.close()


def kill(run: Run, rng: random.Random) -> tuple[str, float, list[int]] | None:
    """Ends a run at a random moment: how, seconds to the last exit, exit statuses.

    None: it was done before.
    """
    while_writing = rng.random() < 0.3
    steps, delay = run.steps() + 1, rng.uniform(0, 3)
    deadline = time.monotonic() + _START
    early = rng.random() < 0.15  # somewhere in the start
    if early:
        deadline = time.monotonic() + rng.uniform(0, 10)
    while not run.ended and time.monotonic() < deadline:
        if run.steps() >= steps and not early:
            if not while_writing:
                time.sleep(delay)
                break
            if run.is_writing():
                break
        time.sleep(0.002)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    which = rng.choice(([0], [1], [0, 1]))
    if run.ended:
        run.wait(1)
        return None
    begin = time.monotonic()
    for index in which:
        if run.processes[index].poll() is None:
            run.processes[index].send_signal(number)
    statuses = run.wait(_LAST_EXIT)
    moment = "start" if early else "checkpoint" if while_writing else "step"
    who = "both" if len(which) == 2 else f"process {which[0]}"
    return f"{number.name} {who}, {moment}", time.monotonic() - begin, statuses


def results(workdir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Losses and evaluations as text by step, and the final parameters."""
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    timing = ("per_second", "share", "seconds")
    figures: dict = collections.defaultdict(list)
    for line in lines:
        kept = {k: repr(v) for k, v in line.items() if not any(word in k for word in timing)}
        figures[line["step"]].append(kept)
    params, _ = Checkpoints(workdir / "checkpoints").restore_params()
    return dict(figures), flatten(params)


def differences(found: Path, expected: Path) -> list[str]:
    """What of a run is not that of another one, bit for bit."""
    (figures, params), (all_figures, all_params) = results(found), results(expected)
    names = [
        f"step {step}"
        for step in sorted(figures.keys() | all_figures.keys())
        if figures.get(step) != all_figures.get(step)
    ]
    for name in sorted(params.keys() | all_params.keys()):
        a, b = params.get(name), all_params.get(name)
        if a is None or b is None or a.tobytes() != b.tobytes():
            names.append(name)
    return names


def main() -> None:
    workdir, arguments = Path(flags.FLAGS.workdir), _PASSED_ON
    rng = random.Random(flags.FLAGS.seed)
    whole = workdir / "whole"
    if Run(whole, arguments).wait(3600) != [0] * PROCESSES:
        raise UserError(f"{whole}/log.txt: the uninterrupted run failed")
    exits: dict[str, list[float]] = collections.defaultdict(list)
    done = different = runs = 0
    while done < flags.FLAGS.kills:
        runs += 1
        folder = workdir / f"run{runs}"
        while True:
            run = Run(folder, arguments)
            killed = kill(run, rng) if done < flags.FLAGS.kills else None
            if killed is None:
                if run.processes[0].poll() is None:
                    run.wait(3600)
                if any(process.returncode for process in run.processes):
                    raise UserError(f"{folder}/log.txt: an undisturbed start failed")
                break
            how, seconds, statuses = killed
            done += 1
            exits[how].append(seconds)
            print(f"{done}: {how}: exits {statuses} after {seconds:.1f} s", flush=True)
            if statuses == [0] * PROCESSES:
                break
        found = differences(folder, whole)
        different += bool(found)
        print(f"run {runs}: {len(found)} differences {found[:3]}", flush=True)
    print("\n| kill | times | seconds to the last exit: median | most |\n| --- | --- | --- | --- |")
    for how, seconds_ in sorted(exits.items()):
        print(
            f"| {how} | {len(seconds_)} | {statistics.median(seconds_):.1f} | {max(seconds_):.1f} |"
        )
    print(f"{done} kills in {runs} runs: {different} runs differ from the uninterrupted one")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for the runs; must be new.", required=True)
    flags.DEFINE_integer("kills", 100, "How many.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the kills.")
    if "--" in sys.argv:
        _PASSED_ON = sys.argv[sys.argv.index("--") + 1 :]
        sys.argv[sys.argv.index("--") :] = []
    run_main(main)
