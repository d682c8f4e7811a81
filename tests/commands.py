"""The project's commands in processes of their own, as users start them, and what they logged."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 900


def start(module: str, *flags: str, devices: int = 1, **variables: str) -> subprocess.Popen:
    """Starts `python -m MODULE` with `variables` of the environment; errors join the output."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(module: str, *flags: str, devices: int = 1) -> str:
    """The output of a command that succeeds."""
    process = start(module, *flags, devices=devices)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return output


def start_two_processes(module: str, *flags: str, devices: int = 1) -> list[subprocess.Popen]:
    """Two processes that talk to each other, each with so many devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        start(
            module,
            *flags,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]


def run_two_processes(module: str, *flags: str, devices: int = 1) -> list[str]:
    """The outputs of `start_two_processes`, which succeed."""
    processes = start_two_processes(module, *flags, devices=devices)
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    """Waits until a file that a process writes has so many lines."""
    deadline = time.monotonic() + 400
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refusal(module: str, *flags: str) -> str:
    """The one line with which a command ends that refuses its input."""
    process = start(module, *flags)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, output
    line = output.splitlines()[-1]
    assert line.startswith("error: "), output
    return line


def losses(workdir: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of each training line, as text: equal means equal bits."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], repr(line["loss"]), repr(line["gradient_norm"]))
        for line in lines
        if "loss" in line
    ]
