"""scripts.select_experts on the command line: from metrics to a dataset and a config."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from common.data.dataset import Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from common.tables import DetectionsWriter
from detection.settings import read_run

ROOT = Path(__file__).parents[2]
LABELS = ["/m/fork", "/m/knife", "/m/cup", "/m/car"]
NAMES = ["Fork", "Knife", "Cup", "Car"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {"LabelName": "cutlery", "Subcategory": [{"LabelName": label} for label in LABELS[:2]]},
        *({"LabelName": label} for label in LABELS[2:]),
    ],
}


def run(folder, *args):
    command = [
        sys.executable, "-m", "scripts.select_experts", f"--dataset={folder / 'set'}",
        f"--metrics={folder / 'metrics.json'}", "--num_classes=1", f"--output={folder / 'expert'}",
        "--base_config=configs/detection/weak_lite0.py", *map(str, args),
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    with DatasetWriter(folder / "set", "set", LABELS, NAMES, HIERARCHY, "") as writer:
        for i in range(16):
            box = [[0.1, 0.1, 0.5, 0.5]]
            writer.add_image(f"i{i:02d}", f"{i}.jpg", (4, 4), box, [i % 4])
        writer.add_split("train", range(12))
        writer.add_split("validation", range(12, 16))
    prefix = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/"
    aps = {f"{prefix}{label}": ap for label, ap in zip(LABELS, (0.1, 0.5, 0.6, 0.7), strict=True)}
    (folder / "metrics.json").write_text(json.dumps(aps))
    with DetectionsWriter(folder / "x.parquet", {"model": "m"}) as writer:
        for i in range(12, 16):  # every cup is called a fork
            label = "/m/fork" if i % 4 == 2 else LABELS[i % 4]
            writer.add(f"i{i}", [label] * 2, [0.9, 0.8], np.tile([[0.1, 0.1, 0.5, 0.5]], (2, 1)))
    kernel = np.array([[9, 1, 0, 0, 1], [9, 0, 1, 1, 1]], np.float32)  # fork and car alike
    safetensors.numpy.save_file({"params/head/classifier/kernel": kernel}, folder / "w.safetensors")
    return folder


def test_three_views_make_a_dataset_and_a_config(folder):
    result = run(
        folder, f"--detections={folder / 'x.parquet'}", f"--workdir={folder / 'w.safetensors'}"
    )
    assert result.returncode == 0, result.stderr
    assert "pos:neg = 1:3.00 (the sampler mixes 1:3)" in result.stdout
    report = json.loads((folder / "expert" / "expert.json").read_text())
    assert [row["name"] for row in report["positive"]] == ["Fork"]
    views = {row["name"]: row["views"] for row in report["negative"]}
    assert views["Knife"] == {"hierarchy": 1.0}
    assert list(views["Cup"]) == ["confusion"]
    assert views["Car"] == {"weights": pytest.approx(0.7071, abs=1e-4)}

    expert = Dataset.open(folder / "expert")
    assert expert.class_labels == ["/m/fork"] and len(expert.split("train")) == 12
    assert len(expert.boxes) == 3 + 1
    assert len(expert.split("validation")) == 4, "whole, to score the expert"
    path = str(folder / "expert" / "config.py")
    assert f"--config={path} --workdir=DIR" in result.stdout
    config = runpy.run_path(path)["get_config"]()
    assert config.data.dir == str(folder / "expert")
    assert config.model.drop_background_rois and config.model.backbone == "efficientnet_lite0"
    # The data is the expert's, whatever sources and steps its base has.
    assert config.data.sources == () and config.data.label_steps.share == 0
    config.data.batch_size = 8
    images, drawn, _ = train_plan(expert, read_run(config).data, 0).batch(0)
    assert (drawn >= 0).sum() == 2 and len(images) == 8


def test_an_expert_starts_from_the_run(folder, tmp_path):
    new = tmp_path / "new"
    result = run(folder, f"--output={new}", f"--workdir={folder}", "--views=hierarchy")
    assert result.returncode == 0, result.stderr
    assert f"--config={new}/config.py --config.init_from={folder} --workdir=DIR" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--views=weights"], "no view has its input"),
        (["--views=hierarchy", "--classes=/m/cup"], "no background images"),
    ],
)
def test_user_errors_are_one_line(folder, tmp_path, args, message):
    result = run(folder, f"--output={tmp_path / 'new'}", *args)
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
