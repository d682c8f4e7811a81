"""A detector with a mask head through the command line: trained, scored, outlining, drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.tables import read_detections
from tests.commands import ROOT, run, run_two_processes
from tests.detection.colour_detector import write_photos

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))[0]


@pytest.fixture(scope="module")
def run_flags(dataset, tmp_path_factory) -> list[str]:
    """Of a run that is trained; its evaluation wrote a table with masks."""
    run_flags = [
        f"--config={ROOT / 'tests' / 'tiny.py'}:1",
        f"--config.data.dir={dataset.directory}",
        "--config.data.mask_size=16",
        "--config.model.mask_head.kind=class_specific",
        "--config.model.mask_head.width=8",
        "--config.model.mask_head.num_convs=1",
        "--config.evaluation.metric=coco_masks",
        f"--workdir={tmp_path_factory.mktemp('run')}",
    ]
    assert "mask" in run("detection.train", *run_flags)
    return run_flags


@pytest.fixture(scope="module")
def evaluated(run_flags) -> Path:
    """Folder of the run's last evaluation."""
    (folder,) = Path(run_flags[-1].removeprefix("--workdir=")).glob("evaluation/*")
    return folder


def test_training_ends_in_a_scored_and_drawn_mask_table(dataset, run_flags, evaluated, tmp_path):
    figures = json.loads((evaluated / "validation_metrics.json").read_text())
    assert -1 <= figures["AP"] <= 1
    table = evaluated / "validation.parquet"
    found = read_detections(table, masks=True)
    assert len(found) and len(found.image_ids) == dataset.num_images
    outlined = tmp_path / "outlined.parquet"
    run("detection.export", *run_flags, f"--proposals={table}", f"--output={outlined}")
    again = read_detections(outlined, masks=True)
    for name in ("scores", "boxes", "mask_sizes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    pictures = tmp_path / "pictures"
    run(
        "scripts.draw_detections",
        f"--dataset={dataset.directory}",
        "--split=validation",
        f"--detections={outlined}",
        f"--output={pictures}",
        "--min_score=0",
    )
    assert (pictures / "overview.jpg").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["found", "given boxes"])
def test_two_processes_write_the_masks_of_one(run_flags, evaluated, tmp_path, what):
    boxes = evaluated / "validation.parquet"
    asked = ["--split=validation" if what == "found" else f"--proposals={boxes}"]
    one, two = tmp_path / "one.parquet", tmp_path / "two"
    run("detection.export", *run_flags, *asked, f"--output={one}", devices=2)
    run_two_processes("detection.export", *run_flags, *asked, f"--output={two}")
    assert len(list(two.iterdir())) == 2
    assert rows_of(two) == rows_of(one)


def rows_of(path: Path) -> list[tuple]:
    """(photo, label, box, score, mask) of each row, sorted."""
    table = read_detections(path, masks=True)
    names = np.array(table.image_ids)[table.image_index]
    labels = np.array(table.labels)[table.label_index]
    columns = (names, labels, table.boxes, table.scores)
    rows = sorted(zip(*(c.tolist() for c in columns), table.masks, strict=True))
    assert len(rows)
    return rows
