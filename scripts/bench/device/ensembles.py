"""The ensemble's operators on the device, beside the ensemble-boxes package on the CPU."""

import re
import subprocess
import sys

from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes

_LINE = re.compile(r"^(.*?) +([\d.]+) s \( *([\d.]+) s compiling\)(?:.*ratio ([\d.]+))?")


def time_operators(report: Report, size: Sizes) -> None:
    """`scripts.bench.bench_ensemble` in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.bench_ensemble"]
    command += [f"--images={size.merged_images}", f"--peer_every={size.peer_every}"]
    command += [f"--classes={size.classes}"]
    result = subprocess.run(command, capture_output=True, text=True)
    found = [match for line in result.stdout.splitlines() if (match := _LINE.match(line))]
    if not found:
        raise RuntimeError(f"bench_ensemble printed no result: {result.stderr.strip()[-500:]}")
    for match in found:
        operator, seconds, compiling, ratio = match.groups()
        figures = {"seconds": float(seconds), "compiling": float(compiling)}
        report.line(operator, **figures, **({"ratio": float(ratio)} if ratio else {}))
    report.line("operators", ok=result.returncode == 0)
