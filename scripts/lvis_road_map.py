"""The road map of the LVIS 2019 solution (table 1), row by row: trains, tests, merges and scores.

    python -m scripts.lvis_road_map --lvis=LVIS --coco=COCO --openimages=OPENIMAGES \\
        --x101=resnext101_64x4d.safetensors --se154=senet154.safetensors --workdir=WORK \\
        [--last_row=6] [--dry_run] [--set=config.data.batch_size=128]

    1  ResNeXt-101, COCO before LVIS              4  boxes of several scales, masks of one
    2  SENet-154                                  5  re-scoring ensemble with experts
    3  OpenImages photos of the shared classes    6  masks of several scales

LVIS, COCO and OPENIMAGES are dataset directories with the splits train and val, train2017 and
val2017, train and validation. WORK gets a work directory of each training, ROW.parquet, a table
with masks, and ROW.json, its figures. What is there already is not made again: the same command
goes on where it stopped. On a pod, where each host runs the same command, take the commands from
--dry_run. --set changes a field of the config of every training and test. The re-scoring factors
are searched on the split that is scored, as the paper's rows are all of its validation split.

A small trial of the whole chain: small canvases and few steps by --set, and few --scales.
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from common.io.commands import run_main
from common.io.endings import EXIT_AGAIN
from common.io.errors import Stopped, UserError

_CONFIG = "configs/detection/lvis_winner.py"
_RS = "configs/ensemble/lvis_rs.py"
# What is merged: the network of row 3 at several scales, and the experts.
_TABLES = {"lvis": "4_boxes", "coco": "5_coco_x101", "openimages": "5_openimages_x101"}
_NO_FACTORS = ("--config.rescoring.rare=1.0", "--config.rescoring.common=1.0")


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      row: of table 1 that needs it first.
      output: what it makes last.
      module: of the command.
      flags: of the command.
      factors: file of ensemble.rescoring whose best factors the command gets as well.
    """

    row: int
    output: Path
    module: str
    flags: tuple[str, ...]
    factors: Path | None = None

    def command(self) -> list[str]:
        """What is run; the factors are read where they are known by now."""
        best = {name: f"BEST_{name.upper()}" for name in ("rare", "common", "frequent")}
        if self.factors is not None and self.factors.exists():
            best = json.loads(self.factors.read_text())["tried"][0]
        factors = [f"--config.rescoring.{name}={best[name]}" for name in ("rare", "common")]
        rest = factors if self.factors is not None else []
        return ["-m", self.module, *self.flags, *rest]


def define_flags() -> None:
    flags.DEFINE_string(
        "lvis", None, "LVIS, prepared with COCO's boxes as --ignore.", required=True
    )
    flags.DEFINE_string("coco", None, "COCO with masks.", required=True)
    flags.DEFINE_string("openimages", None, "OpenImages V5.", required=True)
    flags.DEFINE_string("x101", None, "Weights of ResNeXt-101 64x4d.", required=True)
    flags.DEFINE_string("se154", None, "Weights of SENet-154.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of everything that is made.", required=True)
    flags.DEFINE_string("split", "val", "Split of LVIS that is scored.")
    flags.DEFINE_list("scales", ["600", "800", "1000", "1200", "1400"], "Of rows 4 to 6.")
    flags.DEFINE_integer("last_row", 6, "Of the table.", lower_bound=1, upper_bound=6)
    flags.DEFINE_bool("dry_run", False, "Print the commands and run none.")
    flags.DEFINE_multi_string("set", [], "config.FIELD=VALUE for every training and test.")


def steps() -> list[Step]:
    """All commands in order."""
    args = flags.FLAGS
    work, changes = Path(args.workdir), tuple(f"--{text}" for text in args.set)
    result: list[Step] = []

    def train(row: int, name: str, data: str, start: str, arg: str = "") -> None:
        final = work / name / "evaluation"  # a training ends with its evaluation
        config = f"--config={_CONFIG}:{name}{arg and ':' + arg}"
        where = (config, f"--config.data.dir={data}", f"--workdir={work / name}")
        result.append(Step(row, final, "detection.train", (*where, start, *changes)))

    def export(row: int, name: str, output: str, *more: str, data: str = args.lvis) -> None:
        where = (f"--config={_CONFIG}:{name}", f"--config.data.dir={data}")
        place = (f"--workdir={work / name}", f"--output={work / output}")
        table = work / output
        result.append(Step(row, table, "detection.export", (*where, *place, *changes, *more)))

    def score(row: int) -> None:
        table = (f"--dataset={args.lvis}", f"--split={args.split}", "--metric=lvis_masks")
        files = (f"--detections={work / str(row)}.parquet", f"--json={work / str(row)}.json")
        result.append(Step(row, work / f"{row}.json", "scripts.score", (*table, *files)))

    def merge(row: int, output: str, *more: str, factors: Path | None = None) -> None:
        inputs = ",".join(f"{name}={work / file}.parquet" for name, file in _TABLES.items())
        # "all": persons are called baby in v0.5 and person in v1.
        maps = "coco=coco_to_lvis:all,openimages=openimages_to_lvis:all"
        common = (f"--config={_RS}", f"--inputs={inputs}", f"--config.mappings={maps}")
        place = (f"--config.dataset={args.lvis}", f"--output={work / output}")
        rest = (f"--config.rescoring.groups={args.lvis}", *more)
        flags_ = (*common, *place, *rest)
        result.append(Step(row, work / output, "ensemble.merge", flags_, factors))

    split = f"--split={args.split}"
    scales = f"--config.test_time.scales=({','.join(args.scales)},)"
    weights = {name: f"--config.model.pretrained={args[name].value}" for name in ("x101", "se154")}
    train(1, "coco_x101", args.coco, weights["x101"])
    train(1, "lvis_x101", args.lvis, f"--config.init_from={work / 'coco_x101'}")
    export(1, "lvis_x101", "1.parquet", split)
    score(1)
    train(2, "coco_se154", args.coco, weights["se154"])
    train(2, "lvis_se154", args.lvis, f"--config.init_from={work / 'coco_se154'}")
    export(2, "lvis_se154", "2.parquet", split)
    score(2)
    best, start = "lvis_se154_openimages", f"--config.init_from={work / 'coco_se154'}"
    train(3, best, args.lvis, start, args.openimages)
    export(3, best, "3.parquet", split)
    score(3)
    export(4, best, "4_boxes.parquet", split, scales)
    export(4, best, "4.parquet", f"--proposals={work / '4_boxes.parquet'}")
    score(4)
    train(5, "openimages_x101", args.openimages, weights["x101"])
    for name in ("coco_x101", "openimages_x101"):  # on LVIS photos, in their own classes
        export(5, name, f"5_{name}.parquet", split, scales, "--other_classes")
    merge(5, "5_uncut.parquet", "--config.max_detections=0", *_NO_FACTORS)
    search = (f"--detections={work / '5_uncut.parquet'}", f"--dataset={args.lvis}", split)
    factors = work / "5_factors.json"
    result.append(Step(5, factors, "ensemble.rescoring", (*search, f"--output={factors}")))
    merge(5, "5_boxes.parquet", factors=factors)
    export(5, best, "5.parquet", f"--proposals={work / '5_boxes.parquet'}")
    score(5)
    export(6, best, "6.parquet", f"--proposals={work / '5_boxes.parquet'}", scales)
    score(6)
    return result


def main() -> None:
    args = flags.FLAGS
    todo = [step for step in steps() if step.row <= args.last_row]
    for number, step in enumerate(todo, start=1):
        line = shlex.join(["python", *step.command()])
        done = step.output.exists()
        print(f"{number}/{len(todo)}, row {step.row}: {line}{'  (done)' * done}", flush=True)
        if args.dry_run or done:
            continue
        status = run_step(step.command())
        if status == EXIT_AGAIN:
            raise Stopped(f"{step.module} of row {step.row}")
        if status:
            raise UserError(f"row {step.row}: {step.module} ended with status {status}; see above")
    if not args.dry_run:
        print(table(range(1, args.last_row + 1), Path(args.workdir)))


def run_step(command: list[str]) -> int:
    """Exit status of a command, which hears of SIGTERM and Ctrl-C and saves what it has done."""
    process = subprocess.Popen([sys.executable, *command])
    # A terminal sends Ctrl-C to both; SIGTERM comes here alone.
    former = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    try:
        return process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def table(rows: Iterable[int], work: Path) -> str:
    """Markdown: mask AP of the rows in percent."""
    names = ("AP", "APr", "APc", "APf")
    lines = ["| row | AP | AP_r | AP_c | AP_f |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        figures = json.loads((work / f"{row}.json").read_text())
        # -1: no class of the group has ground truth.
        shares = [figures[name] for name in names]
        values = " | ".join(f"{100 * share:.1f}" if share >= 0 else "-" for share in shares)
        lines.append(f"| {row} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    run_main(main)
