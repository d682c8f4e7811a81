"""The command of `scripts/bench/accelerator`: runs the parts, each within its time.

    scripts/bench/accelerator --output=accelerator.json [--parts=correct,fast,profile]
    scripts/bench/accelerator --parts=learn --seconds=240
    scripts/bench/accelerator --dry_run

Prints each line as soon as it is known and writes a JSON file anew after each, so that whatever
stops the command leaves all that was measured. Exit status 1: something failed, was wrong or had
no time.
"""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from scripts.bench.device import goals
from scripts.bench.device.worker import PARTS

_SHARES = {"correct": 100.0, "fast": 370.0, "profile": 50.0, "learn": 480.0}  # seconds
_DEFAULT = ("correct", "fast", "profile")
_LOGGED = 5  # last lines of a crashed worker that are kept


def define_flags() -> None:
    flags.DEFINE_list("parts", list(_DEFAULT), f"Some of {', '.join(PARTS)}; a dry run has all.")
    flags.DEFINE_string("output", "accelerator.json", "Results.")
    flags.DEFINE_float("seconds", 520.0, "After which all is stopped.", lower_bound=1.0)
    flags.DEFINE_list("variants", [], "Of learn: some of ablate_detection's; default: its own.")
    flags.DEFINE_bool("dry_run", False, "All cases, so small that a CPU tries them in a minute.")


# Of a worker: part, file of events, cases that are done, seconds that are left.
Command = Callable[[str, Path, list[str], float], list[str]]


def worker_command(part: str, events: Path, done: list[str], seconds: float) -> list[str]:
    command = [sys.executable, "-m", "scripts.bench.device.worker", f"--part={part}"]
    command += [f"--report={events}", f"--skip={','.join(done)}", f"--seconds={seconds}"]
    command.append(f"--variants={','.join(flags.FLAGS.variants)}")
    return command + ["--dry_run"] * flags.FLAGS.dry_run


def environment(dry_run: bool, programs: Path) -> dict[str, str]:
    """Of a worker: programs are kept, and other processes may use the device's memory too."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(programs.absolute()),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if dry_run:  # programs that run once
        kept["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
    return kept | os.environ


class Part:
    """Runs a part's worker, again without the case at fault when that case kills or outlasts it."""

    def __init__(self, name: str, seconds: float, log: Path, command: Command, environment: dict):
        self.name, self.seconds, self.log = name, seconds, log
        self.command, self.environment = command, environment
        self.begin = time.monotonic()
        self.results: dict[str, Any] = {"cases": {}}

    def run(self, changed: Callable[[], None]) -> None:
        """`changed` is called after each event."""
        while self.seconds_left() > 0 and self._run_worker(changed):
            pass
        self.results["seconds"] = time.monotonic() - self.begin
        for case in self.results["cases"].values():
            case.setdefault("status", "no time left")
        changed()

    def seconds_left(self) -> float:
        return self.begin + self.seconds - time.monotonic()

    def _run_worker(self, changed: Callable[[], None]) -> bool:
        """Returns whether there is a worker to start for the cases that are left."""
        cases = self.results["cases"]
        done = [name for name, case in cases.items() if "status" in case]
        with tempfile.TemporaryDirectory() as folder, open(self.log, "a") as log:
            events = Path(folder) / "events"
            events.touch()
            command = self.command(self.name, events, done, self.seconds_left())
            start = log.tell()
            worker = subprocess.Popen(
                command, stderr=log, env=self.environment, start_new_session=True
            )
            try:
                status = self._follow(worker, events, changed)
            finally:
                with contextlib.suppress(ProcessLookupError):  # it and what it started
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if status == "":
            return False
        running = [case for case in cases.values() if "begin" in case and "status" not in case]
        lines = self.log.read_text(errors="replace")[start:].strip().splitlines()[-_LOGGED:]
        if not running:
            self.results["error"] = f"{status}: " + " | ".join(lines)
            print(f"  {self.name} {self.results['error']}", flush=True)
            return False
        running[0]["status"] = status
        running[0]["seconds"] = time.monotonic() - running[0].pop("begin")
        if status.startswith("crashed"):
            running[0]["error"] = " | ".join(lines)
        print(f"  {status}", flush=True)
        changed()
        return True

    def _follow(self, worker: subprocess.Popen, events: Path, changed: Callable[[], None]) -> str:
        """Reads events until the worker ends or has no time left; "" when it ended well."""
        with open(events, encoding="utf-8") as lines:
            limit = self.begin + self.seconds
            while True:
                ended = worker.poll()
                for line in iter(lines.readline, ""):
                    limit = min(self._take(json.loads(line)), self.begin + self.seconds)
                    changed()
                if ended is not None:
                    return "" if ended == 0 else f"crashed with status {ended}"
                if time.monotonic() > limit:
                    return "stopped: no time left"
                time.sleep(0.05)

    def _take(self, event: dict[str, Any]) -> float:
        """Keeps an event; returns when the worker's case is to end."""
        cases, kind = self.results["cases"], event.pop("event")
        if kind == "plan":
            for name in event["cases"]:
                cases.setdefault(name, {"lines": []})
            return float("inf")
        case = cases[event.pop("case")]
        if kind == "start":
            case["begin"], case["limit"] = time.monotonic(), event["limit"]
        elif kind == "line":
            case["lines"].append(event)
        elif kind == "error":
            case["error"] = event["text"]
        elif kind == "end":
            case["seconds"] = time.monotonic() - case.pop("begin")
            wrong = any(line.get("ok") is False for line in case["lines"])
            case["status"] = "failed" if "error" in case else "wrong" if wrong else "done"
            return float("inf")
        return case["begin"] + case["limit"]


def main() -> int:
    values = flags.FLAGS
    for name in values.parts:
        if name not in PARTS:
            raise UserError(f"--parts: found {name!r}, expected some of {', '.join(PARTS)}")
    if not values.dry_run:
        return run_parts(values.parts, environment(False, Path(".accelerator/compiled")))
    with tempfile.TemporaryDirectory() as folder:
        return run_parts(PARTS, environment(True, Path(folder)))


def run_parts(names: Sequence[str], workers: dict[str, str]) -> int:
    """`workers`: environment of theirs."""
    values = flags.FLAGS
    output = Path(values.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    results: dict[str, Any] = {
        "jax": importlib.metadata.version("jax"),
        "dry_run": values.dry_run,
        "parts": {},
    }

    def changed() -> None:
        results["seconds"] = time.monotonic() - begin
        write_json(output, results)

    for number, name in enumerate(names):
        left = begin + values.seconds - time.monotonic()
        # What an earlier part left goes to all that follow.
        seconds = left * _SHARES[name] / sum(_SHARES[later] for later in names[number:])
        print(f"{name}: {seconds:.0f} of {left:.0f} s", flush=True)
        part = Part(name, seconds, output.with_suffix(".log"), worker_command, workers)
        results["parts"][name] = part.results
        part.run(changed)
    results["goals"] = [] if values.dry_run else goals.judge(results["parts"])
    changed()
    for goal in results["goals"]:
        print(f"goal: {goal}")
    bad = [
        f"{name}/{case}: {found['status']}"
        for name, part in results["parts"].items()
        for case, found in part["cases"].items()
        if found["status"] != "done"
    ]
    bad += [f"{n}: {p['error']}" for n, p in results["parts"].items() if "error" in p]
    print(f"{output}: {results['seconds']:.0f} s", *bad, sep="\n  ", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    define_flags()
    run_main(main)
