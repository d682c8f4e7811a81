"""A long-tailed set in LVIS form: one model is trained, exported with masks, scored and drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.tables import DetectionsReader
from tests import tiny
from tests.commands import run

pytestmark = pytest.mark.slow

CONFIG = """
from configs.detection import lvis_r50_eql_rfs
from tests import tiny


def get_config(arg=None):
    config = tiny.shrink(lvis_r50_eql_rfs.get_config())
    config.data.dir = {dataset!r}
    config.data.repeat_threshold = 0.9
    config.model.box_head.classifier.eql.threshold = 0.5
    config.optimizer.update(num_epochs=0.0, num_steps=4, decay_epochs=(), warmup_steps=2)
    return config
"""


def coco_file(folder: Path, split: str, seed: int, first: int, count: int) -> Path:
    """Photos with coloured triangles, and their COCO file."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    y, x = np.mgrid[:64, :64]
    for number in range(first, first + count):
        pixels = rng.integers(90, 130, (64, 64, 3)).astype(np.uint8)
        images.append({"id": number, "file_name": f"{number:06d}.png", "height": 64, "width": 64})
        for category in range(3):
            left, top, side = *rng.integers(0, 34, 2).tolist(), 28
            corner = (x >= left) & (y >= top) & (x - left + y - top < side)
            pixels[corner] = tiny.COLOURS[category]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [left, top, side, side],
                    "area": side * side / 2,
                    "iscrowd": 0,
                    "segmentation": [[left, top, left + side, top, left, top + side]],
                }
            )
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    names = enumerate(("red", "green", "blue"), start=1)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names],
    }
    path = folder / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def test_from_coco_files_to_scored_and_drawn_masks(tmp_path):
    train = coco_file(tmp_path, "train", 0, 1, 8)
    validation = coco_file(tmp_path, "val", 1, 101, 4)
    tail, dataset, work = (str(tmp_path / name) for name in ("tail", "set", "work"))
    limits = ("--rare=1", "--common=3")
    where = (f"--train={train}", f"--validation={validation}", f"--output={tail}")
    output = run("scripts.make_long_tail", *where, *limits)
    assert "frequent: 1 classes 8 to 8 training photos each" in output
    source = (f"--source={tail}/lvis_*.json", f"--images={tmp_path}", f"--output={dataset}")
    run("scripts.prepare_data", "lvis", *source, f"--ignore={tail}/ignore.json")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(dataset=dataset))
    where = (f"--config={config}", f"--workdir={work}")
    run("detection.train", *where)
    table = tmp_path / "masks.parquet"
    run("detection.export", *where, "--split=val", f"--output={table}")
    assert DetectionsReader(table).has_masks
    of = (f"--dataset={dataset}", "--split=val", f"--detections={table}")
    run("scripts.score", "--metric=lvis_masks", *of, f"--json={tmp_path / 'score.json'}")
    figures = json.loads((tmp_path / "score.json").read_text())
    (trained,) = Path(work).glob("evaluation/*/val_metrics.json")
    assert figures["AP"] == pytest.approx(json.loads(trained.read_text())["AP"], abs=1e-6)
    assert {"APr", "APc", "APf", "AR@300"} <= figures.keys() and figures["APr"] >= 0
    run("scripts.draw_detections", *of, f"--output={tmp_path / 'pictures'}")
    assert len(list((tmp_path / "pictures").glob("[0-9]*.jpg"))) == 4
