"""Weakly supervised training through the command line: resumed, on two processes, and its boxes."""

from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import PRESENT, Dataset
from common.tables import read_detections
from tests import tiny
from tests.commands import ROOT, losses, run, run_two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def flags(dataset: Path, workdir: Path) -> list[str]:
    return [
        f"--config={ROOT / 'tests' / 'tiny.py'}:weak",
        f"--config.data.dir={dataset}",
        f"--workdir={workdir}",
    ]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of 9 steps on two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    output = run("detection.train", *flags(dataset, workdir), devices=2)
    assert "labels: " in output and "3 classes are verified on 9 of them" in output
    assert "note: mined boxes count from step 0 of both kinds on" in output
    first = output.index("step 1")
    for kind in ("4 images of 64x64 ...", "4 images of 64x64 with labels only ..."):
        assert output.index(f"compiling the training step for {kind}") < first
    assert "loss/mined_box_class" in (workdir / "metrics.jsonl").read_text()
    return workdir


def test_a_stopped_run_goes_on_as_if_it_had_not(dataset, finished, tmp_path):
    workdir = tmp_path / "stopped"
    command = ["detection.train", *flags(dataset, workdir)]
    part = ["--config.optimizer.num_epochs=0.8", "--config.evaluation.every_epochs=-1"]
    run(*command, *part, devices=2)
    assert "resuming at step 5" in run(*command, devices=2)
    assert losses(workdir) == losses(finished)
    assert [step for step, *_ in losses(finished)] == list(range(1, 10))
    # Gradients of the weak head are clipped by themselves.
    assert '"apart"' in (finished / "checkpoints" / "9" / "training" / "_METADATA").read_text()


@pytest.mark.multiprocess
def test_two_processes_equal_one(dataset, finished, tmp_path):
    run_two_processes("detection.train", *flags(dataset, tmp_path / "two"))
    assert losses(tmp_path / "two") == losses(finished)


def test_mined_boxes_are_exported_for_the_classes_that_are_there(dataset, finished, tmp_path):
    table = tmp_path / "mined.parquet"
    run(
        "detection.export", f"--workdir={finished}", "--mined", "--split=train", f"--output={table}"
    )
    detections, opened = read_detections(table), Dataset.open(dataset)
    assert len(detections.image_ids) == 9
    found = {
        (detections.image_ids[image], detections.labels[label])
        for image, label in zip(detections.image_index, detections.label_index, strict=True)
    }
    expected = set()
    for image in opened.split("train"):
        classes, states = opened.image_labels(image)
        for class_ in np.asarray(classes)[np.asarray(states) == PRESENT]:
            expected.add((opened.image_id(image), opened.class_labels[class_]))
    assert found == expected
