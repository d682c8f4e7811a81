"""Compiles the training step of every config for a slice of 512 devices; writes the table of them.

    pip install libtpu
    python -m scripts.bench.compile_table --workdir=DIR [--only=r50,r50_dh]

Runs scripts.plan_pod in one process a program, a small and a large config also for the newer
slices. DIR keeps a report a program, so that the same command goes on where it stopped, and
gets the table, `table.md`. A program that does not fit the device is a row as well.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.training.pod.topologies import GIB

_MODELS = {  # config -> images of one device
    "detection/r50": 2,
    "detection/r50_dh": 2,
    "detection/r50_cascade": 2,
    "detection/r50_cascade4": 2,
    "detection/r50_refine": 2,
    "detection/r50_nas_fpn": 2,
    "detection/decoupled": 2,
    "detection/efficientnet": 2,
    "detection/x101_dcn": 2,
    "detection/x101_dcn_dh": 2,
    "detection/x152_dcn": 2,
    "detection/se154_dcn": 2,
    "detection/se154_dcn_dh": 2,
    "detection/se154_dcn_cascade": 2,
    "detection/nasnet": 2,
    "segmentation/hrnet_w48_112": 16,
    "segmentation/hrnet_w48_256": 8,
    "segmentation/hrnet_w48_200_300": 6,
}
_EVERYWHERE = ("detection/r50", "detection/se154_dcn_dh")
_FIRST, *_NEWER = ("v3-512", "v4-1024", "v5p-1024", "v6e-512")
_HEADER = (
    "| config | slice | canvas | a device | parameters | TFLOP an image | schedule "
    "| temporaries a device | in all | of | compiled in |\n" + 11 * "| --- " + "|\n"
)


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of reports and table.", required=True)
    flags.DEFINE_list("only", [], "Names of configs; default: all.")


def programs(only: list[str]) -> list[tuple[str, str]]:
    """(config, slice) of each row.

    Raises:
      UserError: a name is no config of the table.
    """
    names = {name.split("/")[1]: name for name in _MODELS}
    for name in only:
        if name not in names:
            raise UserError(f"--only: found {name!r}, expected some of {', '.join(names)}")
    chosen = [names[name] for name in only] or list(_MODELS)
    rows = [(name, _FIRST) for name in chosen]
    return rows + [(n, place) for n in chosen if n in _EVERYWHERE for place in _NEWER]


def row(report: dict) -> str:
    """A line of the table."""
    memory = report["memory_bytes"]
    height, width = report["canvas"]
    return (
        f"| `{report['config']}` | {report['slice']} | {height}x{width} "
        f"| {report['images_per_device']} | {report['parameters'] / 1e6:.1f} M "
        f"| {report['flops_per_image'] / 1e12:.3f} | {report['hours']:.1f} h "
        f"| {memory['temporaries'] / GIB:.2f} GiB "
        f"| {memory['total'] / GIB:.2f} GiB | {report['hbm_bytes'] / GIB:.0f} GiB "
        f"| {report['compile_seconds']:.0f} s |\n"
    )


def main():
    workdir = Path(flags.FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows, failed = [], []
    todo = programs(flags.FLAGS.only)
    for number, (name, place) in enumerate(todo, start=1):
        file = workdir / f"{name.replace('/', '-')}-{place}.json"
        start = time.perf_counter()
        outcome = "fits"
        if not file.exists():
            command = [
                sys.executable,
                "-m",
                "scripts.plan_pod",
                f"--config=configs/{name}.py",
                f"--slice={place}",
                f"--images_per_device={_MODELS[name]}",
                f"--json={file}",
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                outcome = result.stderr.strip().splitlines()[-1]
                failed.append(f"{name} on {place}: {outcome}")
        if file.exists():
            rows.append(row(json.loads(file.read_text())))
            write_text(workdir / "table.md", _HEADER + "".join(rows))
        print(
            f"program {number}/{len(todo)}: {name} on {place}  "
            f"{time.perf_counter() - start:.0f} s  {outcome}",
            flush=True,
        )
    print(_HEADER + "".join(rows))
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} programs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
