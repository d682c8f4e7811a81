"""Training through the command line: kills, resumes, other work directories, several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.data.dataset import Dataset
from common.detections import read_detections
from tests import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def start(module: str, dataset: Path, workdir: Path, *flags: str, devices: int = 1, **environment):
    """Starts `python -m MODULE` on the tiny config."""
    command = [
        sys.executable, "-m", module, f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--config.data.dir={dataset}", f"--workdir={workdir}", *flags,
    ]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(dataset.parent / "compiled"), **environment,
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def run(*args, **kwargs) -> str:
    process = start(*args, **kwargs)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def losses(workdir: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of each training line, as text: equal means equal bits."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], repr(line["loss"]), repr(line["gradient_norm"]))
        for line in lines if "loss" in line
    ]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of 9 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run("detection.train", dataset, workdir)
    return workdir


def test_kill_and_same_command_give_the_uninterrupted_losses(dataset, finished, tmp_path):
    workdir = tmp_path / "killed"
    process = start("detection.train", dataset, workdir)
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = run("detection.train", dataset, workdir)
    assert "resuming at step" in output
    assert losses(workdir) == losses(finished)
    assert [step for step, *_ in losses(finished)] == list(range(1, 10))


def test_export_covers_the_split_and_evaluate_scores_it(dataset, finished, tmp_path):
    table = tmp_path / "x.parquet"
    run("detection.export", dataset, finished, "--split=validation", f"--output={table}")
    detections = read_detections(table)
    opened = Dataset.open(dataset)
    expected = sorted(opened.image_id(i) for i in opened.split("validation"))
    assert list(detections.image_ids) == expected
    assert detections.metadata["step"] == 9 and detections.metadata["model"] == "tiny"
    output = run("detection.evaluate", dataset, finished, "--split=validation")
    assert "OpenImagesDetectionChallenge_Precision/mAP@0.5IOU" in output
    metrics = finished / "evaluation" / "9" / "validation_metrics.json"
    values = json.loads(metrics.read_text())
    assert 0 <= values["OpenImagesDetectionChallenge_Precision/mAP@0.5IOU"] <= 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--config.model.backbone=resnet34"], "config.model.backbone"),
        (["--config.optimizer.momentum=0.5"], "config.optimizer.momentum"),
    ],
)
def test_work_directory_of_another_config_is_refused(dataset, finished, flags, text):
    process = start("detection.train", dataset, finished, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: ") and text in output.splitlines()[-1]


def test_missing_dataset_directory_is_one_line(tmp_path):
    process = start("detection.train", tmp_path / "nothing", tmp_path / "work")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert str(tmp_path / "nothing") in output.splitlines()[-1]


@pytest.mark.multiprocess
def test_two_processes_with_two_devices_equal_one_with_four(dataset, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run("detection.train", dataset, one, devices=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        start(
            "detection.train", dataset, two, devices=2, JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert losses(two) == losses(one)
    covered = read_detections(two / "evaluation" / "9" / "validation.parquet").image_ids
    assert len(covered) == 3
