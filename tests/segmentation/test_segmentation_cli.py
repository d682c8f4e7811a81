"""Segmentation through the command line: kills, resumes, masks for a table, voters, bad input."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.masks import rle
from common.tables import DetectionsWriter, read_detections
from common.training import distributed
from segmentation import export
from segmentation.inference import Voter
from segmentation.settings import read_run
from segmentation.voters import open_voters
from tests import tiny_masks
from tests.commands import ROOT, losses, run, run_two_processes, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny_masks.write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def common(dataset) -> list[str]:
    return [f"--config={ROOT / 'tests' / 'tiny_masks.py'}", f"--config.data.dir={dataset}"]


@pytest.fixture(scope="module")
def finished(common, tmp_path_factory) -> Path:
    """An uninterrupted run of 30 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    output = run("segmentation.train", *common, f"--workdir={workdir}")
    assert "18 instances with masks in train" in output
    return workdir


def test_kill_and_same_command_give_the_uninterrupted_losses(common, finished, tmp_path):
    workdir = tmp_path / "killed"
    process = start("segmentation.train", *common, f"--workdir={workdir}")
    deadline = time.monotonic() + 600
    while not (workdir / "checkpoints" / "5").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = run("segmentation.train", *common, f"--workdir={workdir}")
    assert "resuming at step" in output
    assert losses(workdir) == losses(finished)
    assert [step for step, *_ in losses(finished)] == list(range(1, 31))
    figures = [w / "evaluation" / "30" / "validation_metrics.json" for w in (workdir, finished)]
    assert figures[0].read_text() == figures[1].read_text()
    values = json.loads(figures[0].read_text())
    assert values["instances"] == 6 and values["instances/disc"] == 3
    assert 0 <= values["mean_iou"] <= 1 and 0 < values["loss"]


def test_export_adds_masks_to_the_rows_of_a_table(dataset, common, finished, tmp_path):
    """Two devices and several voters; rows, scores and labels stay."""
    opened = Dataset.open(dataset)
    boxes = tiny_masks.write_boxes(tmp_path / "x.parquet", opened, opened.split("validation"))
    output = tmp_path / "y.parquet"
    text = run(
        "segmentation.export",
        *common,
        f"--voters={finished},{finished}:flip",
        f"--boxes={boxes}",
        f"--output={output}",
        "--config.test.vote=hard",
        devices=2,
    )
    before, after = read_detections(boxes), read_detections(output, masks=True)
    assert f"segment {len(before)}/{len(before)}" in text
    assert list(after.image_ids) == list(before.image_ids)
    for name in ("image_index", "scores", "boxes"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    labels = [np.array(d.labels)[d.label_index].tolist() for d in (before, after)]
    assert labels[0] == labels[1]
    assert (after.mask_sizes == tiny_masks.SIZE).all()
    height, width = tiny_masks.SIZE
    for counts, box in zip(after.masks, after.boxes, strict=True):
        rows, columns = rle.decode(counts, tiny_masks.SIZE).nonzero()
        if len(rows):
            xmin, ymin, xmax, ymax = box * [width, height, width, height]
            assert columns.min() >= np.floor(xmin) and columns.max() < np.ceil(xmax)
            assert rows.min() >= np.floor(ymin) and rows.max() < np.ceil(ymax)
    assert after.metadata["model"] == "boxes"
    made_by = after.metadata["segmentation"]
    assert [v["flip"] for v in made_by["voters"]] == [False, True]
    assert (made_by["vote"], made_by["threshold"]) == ("hard", 0.5)
    assert made_by["voters"][0]["step"] == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.parquet", "y.parquet"]


@pytest.mark.multiprocess
def test_two_processes_write_the_masks_of_one(dataset, common, finished, tmp_path):
    opened = Dataset.open(dataset)
    boxes = tiny_masks.write_boxes(tmp_path / "x.parquet", opened, opened.split("train"))
    one, two = tmp_path / "one.parquet", tmp_path / "two"
    flags = [*common, f"--workdir={finished}", f"--boxes={boxes}"]
    run("segmentation.export", *flags, f"--output={one}", devices=2)
    run_two_processes("segmentation.export", *flags, f"--output={two}")
    assert len(list(two.iterdir())) == 2
    assert rows_of(two) == rows_of(one)


def rows_of(path: Path) -> list[tuple]:
    """(photo, box, score, mask) of each row, sorted."""
    table = read_detections(path, masks=True)
    names = np.array(table.image_ids)[table.image_index]
    return sorted(
        zip(names.tolist(), table.boxes.tolist(), table.scores.tolist(), table.masks, strict=True)
    )


# ------------------------------------------------------------------------------ in this process


@pytest.fixture(scope="module")
def setting(dataset, finished, tmp_path_factory):
    """What `add_masks` takes: settings, dataset, networks, mesh, table."""
    config = tiny_masks.get_config()
    config.data.dir = str(dataset)
    settings = read_run(config)
    opened = Dataset.open(dataset)
    mesh = distributed.make_mesh()
    networks, _ = open_voters([str(finished)], mesh)
    boxes = tiny_masks.write_boxes(
        tmp_path_factory.mktemp("boxes") / "x.parquet", opened, opened.split("train")
    )
    return settings, opened, networks, mesh, boxes


def masks_of(setting, output: Path, voters, **test) -> list[bytes]:
    settings, dataset, networks, mesh, boxes = setting
    batch_size = test.pop("batch_size", settings.evaluation.batch_size)
    settings = dataclasses.replace(
        settings,
        evaluation=dataclasses.replace(settings.evaluation, batch_size=batch_size),
        test=dataclasses.replace(settings.test, **test),
    )
    export.add_masks(
        settings, dataset, networks, voters, mesh, boxes, output, say=lambda *_, **__: None
    )
    return list(read_detections(output, masks=True).masks)


def test_masks_do_not_depend_on_batches_nor_on_repeated_voters(setting, tmp_path):
    alone = masks_of(setting, tmp_path / "a.parquet", [Voter(0, False)])
    assert masks_of(setting, tmp_path / "b.parquet", [Voter(0, False)], batch_size=7) == alone
    for rule in ("mean", "hard"):
        twice = masks_of(setting, tmp_path / f"{rule}.parquet", [Voter(0, False)] * 2, vote=rule)
        assert twice == alone
    everything = masks_of(setting, tmp_path / "c.parquet", [Voter(0, True)], threshold=0.0)
    areas = rle.areas(everything)
    _, _, _, _, boxes = setting
    table = read_detections(boxes)
    sides = (table.boxes[:, 2:] - table.boxes[:, :2]) * [64, 48]
    whole = (sides > 0).all(1) & (sides > 1).all(1)
    np.testing.assert_allclose(areas[whole], sides[whole].round().prod(1))
    assert areas[(sides <= 0).any(1)].tolist() == [0]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "without rows"),
        ([("photo000", "wheel", [0, 0, 1, 1])], "'wheel'"),
        ([("nowhere", "disc", [0, 0, 1, 1])], "image 'nowhere' is not in"),
    ],
)
def test_tables_that_do_not_fit_are_one_line(setting, tmp_path, rows, text):
    settings, dataset, networks, mesh, _ = setting
    boxes = tmp_path / "x.parquet"
    with DetectionsWriter(boxes, {}) as writer:
        for image_id, label, box in rows:
            writer.add(image_id, [label], [0.5], [box])
    with pytest.raises(UserError, match=text) as error:
        export.add_masks(
            settings, dataset, networks, [Voter(0, False)], mesh, boxes, tmp_path / "y.parquet"
        )
    assert "x.parquet" in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_a_folder_that_is_no_segmentation_run_is_refused(setting, tmp_path):
    mesh = setting[3]
    with pytest.raises(UserError, match="config.json: no such file"):
        open_voters([str(tmp_path)], mesh)
    (tmp_path / "config.json").write_text('{"model": {"backbone": "resnet50"}}')
    with pytest.raises(UserError, match="not the config of a segmentation run"):
        open_voters([f"{tmp_path}:flip"], mesh)
