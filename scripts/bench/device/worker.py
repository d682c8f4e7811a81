"""The process of a part: runs its cases in turns. Started by `scripts.bench.device.run`."""

import importlib
import traceback
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from common.io.commands import run_main
from scripts.bench.device import sizes
from scripts.bench.device.report import Report

PARTS = ("correct", "fast", "profile", "learn")
# Imported in the worker alone: the command itself needs no device. A `Case` each, in CASES.
_MODULES = {
    "correct": ("correct_kernels", "correct_models", "unit_tests"),
    "fast": ("speed",),
    "profile": ("trace",),
    "learn": ("learn",),
}


class Case(NamedTuple):
    """One step of a part.

    Attributes:
      name: unique in its part.
      limit: seconds after which it is stopped.
      run: function of the report and the sizes.
    """

    name: str
    limit: float
    run: Callable[[Report, sizes.Sizes], None]


def define_flags() -> None:
    flags.DEFINE_enum("part", None, PARTS, "Which cases to run.", required=True)
    flags.DEFINE_string("report", None, "File of events.", required=True)
    flags.DEFINE_list("skip", [], "Cases to leave out.")
    flags.DEFINE_list("variants", [], "Of learn; default: its own.")
    flags.DEFINE_bool("dry_run", False, "Small sizes.")
    flags.DEFINE_float("seconds", 0.0, "That the part has.")


def main() -> None:
    values = flags.FLAGS
    report = Report(values.report)
    size = sizes.DRY if values.dry_run else sizes.FULL
    cases = [
        case
        for name in _MODULES[values.part]
        for case in importlib.import_module(f"scripts.bench.device.{name}").CASES
        if case.name not in values.skip
    ]
    report.plan([case.name for case in cases])
    for case in cases:
        report.start(case.name, size.patience * case.limit)
        try:
            case.run(report, size)
        except Exception as error:  # the next case may work: nothing runs twice on such a machine
            traceback.print_exc()
            report.error(f"{type(error).__name__}: {error}"[:2000])
        report.end()


if __name__ == "__main__":
    define_flags()
    run_main(main)
