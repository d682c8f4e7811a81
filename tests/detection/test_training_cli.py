"""Training through the command line: kills, resumes, other work directories, several processes."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.tables import read_detections
from tests import tiny
from tests.commands import (
    ROOT,
    losses,
    refusal,
    run,
    run_two_processes,
    start,
    start_two_processes,
    wait_for_lines,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def flags(dataset: Path, workdir: Path) -> list[str]:
    """With elaborate augmentation: of all, its batches have the most random numbers."""
    return [
        f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--config.data.dir={dataset}",
        "--config.data.sampler=class_aware",
        "--config.data.elaborate.scale=crop",
        "--config.data.elaborate.rotate=True",
        f"--workdir={workdir}",
    ]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of 9 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run("detection.train", *flags(dataset, workdir))
    return workdir


def test_kill_and_same_command_give_the_uninterrupted_losses(dataset, finished, tmp_path):
    workdir = tmp_path / "killed"
    process = start("detection.train", *flags(dataset, workdir))
    wait_for_lines(workdir / "metrics.jsonl", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = run("detection.train", *flags(dataset, workdir))
    assert "resuming at step" in output
    assert losses(workdir) == losses(finished)
    assert [step for step, *_ in losses(finished)] == list(range(1, 10))


def test_export_and_evaluate_name_the_classes_of_the_model(dataset, finished, tmp_path):
    """The config is that of the run; a dataset with other order of the classes changes nothing."""
    table = tmp_path / "x.parquet"
    other = tiny.write_dataset(tmp_path / "other", labels=("blue", "green", "red"), order=(2, 1, 0))
    common = [f"--workdir={finished}", f"--config.data.dir={other}", "--split=validation"]
    run("detection.export", *common, f"--output={table}")
    detections = read_detections(table)
    opened = Dataset.open(dataset)
    expected = sorted(opened.image_id(i) for i in opened.split("validation"))
    assert list(detections.image_ids) == expected
    assert detections.metadata["step"] == 9 and detections.metadata["model"] == "tiny"
    assert detections.metadata["classes"] == ["red", "green", "blue"]
    trained = read_detections(finished / "evaluation" / "9" / "validation.parquet")
    labels, trained_labels = (
        [table.labels[i] for i in table.label_index] for table in (detections, trained)
    )
    assert labels == trained_labels and (detections.scores == trained.scores).all()
    metrics = finished / "evaluation" / "9" / "validation_metrics.json"
    before = json.loads(metrics.read_text())
    output = run("detection.evaluate", *common)
    assert "OpenImagesDetectionChallenge_Precision/mAP@0.5IOU" in output
    assert json.loads(metrics.read_text()) == before


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--config.model.backbone=resnet34", "config.model.backbone"),
        ("--config.optimizer.momentum=0.5", "config.optimizer.momentum"),
    ],
)
def test_work_directory_of_another_config_is_refused(dataset, finished, flag, text):
    assert text in refusal("detection.train", *flags(dataset, finished), flag)


def test_missing_dataset_directory_is_one_line(tmp_path):
    nothing = tmp_path / "nothing"
    assert str(nothing) in refusal("detection.train", *flags(nothing, tmp_path / "work"))


@pytest.fixture(scope="module")
def on_four_devices(dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "four"
    run("detection.train", *flags(dataset, workdir), devices=4)
    return workdir


@pytest.mark.multiprocess
def test_two_processes_with_two_devices_equal_one_with_four(dataset, on_four_devices, tmp_path):
    two = tmp_path / "two"
    run_two_processes("detection.train", *flags(dataset, two), devices=2)
    assert losses(two) == losses(on_four_devices)
    table = two / "evaluation" / "9" / "validation.parquet"
    assert len(read_detections(table).image_ids) == 3 and table.is_dir()
    # One process writes a file where two wrote a folder of shards, and the reverse.
    run("detection.evaluate", f"--workdir={two}", devices=2)
    assert len(read_detections(table).image_ids) == 3 and table.is_file()
    run_two_processes("detection.evaluate", f"--workdir={two}")
    assert len(read_detections(table).image_ids) == 3 and table.is_dir()


@pytest.mark.multiprocess
def test_sigterm_to_one_of_two_saves_and_two_devices_go_on(dataset, on_four_devices, tmp_path):
    """Both exit with 75 and one checkpoint; half the devices go on, equal but for rounding."""
    workdir = tmp_path / "stopped"
    processes = start_two_processes("detection.train", *flags(dataset, workdir), devices=2)
    wait_for_lines(workdir / "metrics.jsonl", 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], "\n".join(outputs)
    assert "stopped by SIGTERM at process 1" in outputs[0]
    output = run("detection.train", *flags(dataset, workdir), devices=2)
    assert "the batch stays in 4 parts, 2 a device" in output
    np.testing.assert_allclose(
        np.array(losses(workdir), float), np.array(losses(on_four_devices), float), rtol=1e-2
    )


def test_a_watcher_beside_a_training_scores_each_checkpoint_once(dataset, tmp_path):
    """Begun first, without a config, and killed; the best checkpoint outlives the retention."""
    workdir = tmp_path / "run"
    watching = [f"--workdir={workdir}", f"--config.data.dir={dataset}"]
    watching += ["--watch", "--poll_seconds=0.1", "--export=best"]
    scored = workdir / "watch" / "validation" / "metrics.jsonl"
    watcher = start("detection.evaluate", *watching)
    training = start("detection.train", *flags(dataset, workdir))
    wait_for_lines(scored, 1, watcher)
    watcher.kill()
    watcher.communicate()
    assert training.wait(400) == 0, training.communicate()[0]
    output = run("detection.evaluate", *watching)
    assert "up to step 9: the training is done" in output
    steps = [json.loads(line)["step"] for line in scored.read_text().splitlines()]
    assert steps == sorted(set(steps)) and {8, 9} <= set(steps)
    best = json.loads((scored.parent / "best.json").read_text())
    assert best["step"] in steps
    table = read_detections(scored.parent / "export" / "validation_best.parquet")
    assert table.metadata["step"] == best["step"]
    kept = scored.parent / "best"
    output = run("detection.evaluate", *flags(dataset, kept), f"--step={best['step']}")
    assert f"= {best['value']:.4f}" in output
