"""Ends trainings of two processes at random, goes on, and compares with the uninterrupted run.

    python -m scripts.bench.bench_kills --kills=100 --workdir=WORK
    python -m scripts.bench.bench_kills --kills=10 --workdir=WORK --module=detection.train \\
        --command_flags="--config=CONFIG --config.data.dir=DIR [further flags of the command]"

One run goes uninterrupted. Then runs are started, ended at a random moment and started again until
they are done, as often as it takes for --kills kills: SIGKILL or SIGTERM, to one process or to
both, anywhere between start and end, or while a checkpoint is written. Each finished run must have
the losses, evaluations and final parameters of the first one, bit for bit. Without --command_flags
it is a tiny classifier on random photos. WORK keeps what was done (kills.jsonl): the same command
goes on where it stopped, for one after --minutes.
"""

import collections
import json
import random
import shlex
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.training.checkpoint import Checkpoints
from common.training.checkpoint_items import flatten
from scripts.bench.pair import PROCESSES, Pair, prepare, tiny_classifier, write_photos

_LAST_EXIT = 120.0  # seconds after which a process counts as hanging
_START = 300.0
_STEPS, _EVERY_STEPS = 30, 3  # of the tiny classifier


def kill(pair: Pair, rng: random.Random) -> dict[str, Any] | None:
    """Ends a run at a random moment and says how; None: it was done before."""
    moment = rng.choices(("start", "checkpoint", "step"), (15, 35, 50))[0]
    lines, delay = pair.lines() + rng.randint(1, 8), rng.uniform(0, 0.3)
    deadline = time.monotonic() + (rng.uniform(0, 6) if moment == "start" else _START)
    while not pair.ended and time.monotonic() < deadline:
        if moment != "start" and pair.lines() >= lines:
            if moment == "step":
                time.sleep(delay)
                break
            if pair.is_writing():
                break
        time.sleep(0.002)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    which = rng.choice(([0], [1], [0, 1]))
    if not pair.joined:  # one alone would wait for the other for minutes
        which = [0, 1]
    if pair.ended:
        return None
    begin = time.monotonic()
    pair.send(number, which)
    statuses = pair.wait(_LAST_EXIT)
    who = "both" if len(which) == PROCESSES else f"process {which[0]}"
    seconds = time.monotonic() - begin
    return dict(signal=number.name, who=who, moment=moment, seconds=seconds, exits=statuses)


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


class Diary:
    """WORK/kills.jsonl: a line a kill and a line a finished run."""

    def __init__(self, path: Path):
        self._path = path
        text = path.read_text() if path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def kills(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "signal" in line]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "differences" in line]

    def table(self) -> str:
        """Kills by kind, with the time to the last exit."""
        seconds = collections.defaultdict(list)
        for line in self.kills:
            seconds[line["signal"], line["who"], line["moment"]].append(line["seconds"])
        rows = [
            f"| {' | '.join(kind)} | {len(times)} | {statistics.median(times):.1f} "
            f"| {max(times):.1f} |\n"
            for kind, times in sorted(seconds.items())
        ]
        title = "| signal | to | in | kills | s to the last exit, median | most |\n"
        different = sum(bool(line["differences"]) for line in self.runs)
        return (
            f"{title}{'| --- ' * 6}|\n{''.join(rows)}\n{len(self.kills)} kills in "
            f"{len(self.runs)} finished runs: {different} differ from the uninterrupted one"
        )


def main() -> None:
    workdir, module = Path(flags.FLAGS.workdir), flags.FLAGS.module
    arguments = shlex.split(flags.FLAGS.command_flags)
    workdir.mkdir(parents=True, exist_ok=True)
    prepare(module, workdir / "programs")
    if not arguments:
        if not (workdir / "photos").exists():
            write_photos(workdir / "photos")
        arguments = [*tiny_classifier(_STEPS, _EVERY_STEPS)]
        arguments += [f"--config.data.dir={workdir / 'photos'}"]
    diary, whole = Diary(workdir / "kills.jsonl"), workdir / "whole"
    if not (workdir / "whole_is_done").exists():
        if Pair(module, whole, arguments).wait(3600) != [0] * PROCESSES:
            raise UserError(f"{whole}/log.txt: the uninterrupted run failed")
        (workdir / "whole_is_done").touch()
    end = time.monotonic() + 60 * flags.FLAGS.minutes
    folder = workdir / f"run{len(diary.runs) + 1}"
    while time.monotonic() < end and (len(diary.kills) < flags.FLAGS.kills or folder.exists()):
        pair = Pair(module, folder, arguments)
        rng = random.Random(f"{flags.FLAGS.seed} {len(diary.kills)}")
        killed = kill(pair, rng) if len(diary.kills) < flags.FLAGS.kills else None
        statuses = pair.wait(3600) if killed is None else killed["exits"]
        if killed is not None:
            diary.add(killed)
            print(len(diary.kills), json.dumps(killed), flush=True)
        if statuses == [0] * PROCESSES:
            found = differences(folder, whole)
            diary.add({"run": folder.name, "differences": found})
            print(json.dumps(diary.lines[-1]), flush=True)
            if found:
                folder.rename(workdir / f"different_{folder.name}")
            else:
                shutil.rmtree(folder)
            folder = workdir / f"run{len(diary.runs) + 1}"
        elif killed is None:
            raise UserError(f"{folder}/log.txt: an undisturbed start failed")
    print("\n" + diary.table())


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for the runs and what was done.", required=True)
    flags.DEFINE_integer(
        "kills", 100, "How many, those that WORK knows of included.", lower_bound=1
    )
    flags.DEFINE_float("minutes", 1e6, "Until no more runs are started.")
    flags.DEFINE_integer("seed", 0, "Of the kills.")
    flags.DEFINE_string("module", "detection.pretrain", "Training command that is ended.")
    flags.DEFINE_string("command_flags", "", "Of it; default: a tiny classifier.")
    run_main(main)
