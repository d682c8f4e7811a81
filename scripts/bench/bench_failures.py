"""How long a run of two processes lives on when one of them fails, and what the other one says.

    python -m scripts.bench.bench_failures --workdir=WORK

A tiny training is started for each failure: a process is killed, is frozen (SIGSTOP), meets a photo
that is damaged, or one that is a pipe (FIFO). Prints a table of the seconds to the last exit.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from scripts.bench.pair import Pair, prepare, tiny_classifier, write_photos

MODULE = "detection.pretrain"
_GOAL = 20.0
_START = 300.0


def replace_photos(folder: Path, make: Callable[[Path], object]) -> None:
    """Puts what `make` makes in the place of every photo."""
    for path in folder.rglob("*.png"):
        new = path.with_suffix(".new")
        make(new)
        new.replace(path)


def failures(photos: Path) -> dict[str, tuple[Callable[[Pair], object], tuple[int, ...]]]:
    """What happens, by name, and which processes then have to end; `photos` are process 1's."""

    def damage(path: Path) -> None:
        path.write_bytes(b"damaged")

    return {
        "process 1 is killed": (lambda pair: pair.send(signal.SIGKILL, [1]), (0, 1)),
        "process 0 is killed": (lambda pair: pair.send(signal.SIGKILL, [0]), (0, 1)),
        "process 1 freezes": (lambda pair: pair.send(signal.SIGSTOP, [1]), (0,)),
        "a photo of process 1 is damaged": (lambda _: replace_photos(photos, damage), (0, 1)),
        "a photo of process 1 is a pipe": (lambda _: replace_photos(photos, os.mkfifo), (0, 1)),
    }


def measure(name: str, workdir: Path, photos: Path, own_photos: Path) -> tuple[float, list[int]]:
    """Seconds from a failure to the last exit, and the exit statuses.

    Raises:
      UserError: a process hangs.
    """
    happens, ends = failures(own_photos)[name]
    shutil.rmtree(own_photos, ignore_errors=True)
    shutil.copytree(photos, own_photos)
    arguments = tiny_classifier(steps=100_000, every_steps=100_000)
    own = [[f"--config.data.dir={folder}"] for folder in (photos, own_photos)]
    pair = Pair(MODULE, workdir, arguments, own)
    deadline = time.monotonic() + _START
    while pair.lines() < 5:
        if pair.ended or time.monotonic() > deadline:
            raise UserError(f"{pair.log}: the training does not start")
        time.sleep(0.02)
    begin = time.monotonic()
    happens(pair)
    try:
        statuses = pair.wait(10 * _GOAL, ends)
        return time.monotonic() - begin, statuses
    finally:
        pair.send(signal.SIGKILL, (0, 1))  # one that is frozen
        pair.wait(10)


def reason(log: Path) -> str:
    """What was said last of a process."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "process " in line]
    return lines[-1].removeprefix("error: ") if lines else "nothing"


def main() -> None:
    workdir = Path(flags.FLAGS.workdir)
    prepare(MODULE, workdir / "programs")
    photos, own_photos = workdir / "photos", workdir / "photos_of_process_1"
    if not photos.exists():
        write_photos(photos)
    rows, slow = [], []
    for number, name in enumerate(failures(own_photos)):
        folder = workdir / f"failure{number}"
        shutil.rmtree(folder, ignore_errors=True)
        seconds, statuses = measure(name, folder, photos, own_photos)
        said = reason(folder / "log.txt")
        rows.append(f"| {name} | {seconds:.1f} | {statuses} | {said} |")
        print(rows[-1], flush=True)
        if seconds > _GOAL or 0 in statuses:
            slow.append(name)
    print(
        "\n| what happens | seconds to the last exit | exit statuses | said |\n"
        + "| --- " * 4
        + "|"
    )
    print("\n".join(rows))
    if slow:
        raise UserError(f"not ended in time: {', '.join(slow)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for the runs.", required=True)
    run_main(main)
