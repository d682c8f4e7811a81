"""A detector with a mask head through the command line: trained, scored, outlining, drawn."""

import json

import numpy as np
import pytest

from common.tables import read_detections
from tests.commands import ROOT, run
from tests.detection.colour_detector import write_photos

pytestmark = pytest.mark.slow


def test_training_ends_in_a_scored_and_drawn_mask_table(tmp_path):
    dataset, _ = write_photos(tmp_path / "photos")
    run_flags = [
        f"--config={ROOT / 'tests' / 'tiny.py'}:1",
        f"--config.data.dir={dataset.directory}",
        "--config.data.mask_size=16",
        "--config.model.mask_head.kind=class_specific",
        "--config.model.mask_head.width=8",
        "--config.model.mask_head.num_convs=1",
        "--config.evaluation.metric=coco_masks",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert "mask" in run("detection.train", *run_flags)
    (evaluated,) = (tmp_path / "run" / "evaluation").iterdir()
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
