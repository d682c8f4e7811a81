"""Anchors chosen by k-means, and recalls that equal those of the anchors the detector makes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data import placement
from common.data.canvases import orientations
from common.data.dataset import DatasetWriter
from detection.assign.anchor_selection import (
    AnchorSet,
    Recall,
    ShapeHistograms,
    best_ratios,
    best_scales,
    fitted_sizes,
    kmeans_1d,
)
from detection.assign.anchors import grid_anchors
from tests.oracles import boxes as box_oracle

STRIDES = (4, 8, 16)


def test_recalls_are_those_of_the_anchors_of_the_detector():
    rng = np.random.default_rng(0)
    canvas = (96, 64)  # height, width
    corners = rng.uniform(0, 1, (90, 2)) * [50, 80]
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (90, 2))], axis=1)
    boxes = np.clip(boxes, 0, [64, 96, 64, 96]).astype(np.float32)
    classes = rng.integers(0, 3, 90)
    for convention, centre in (("h/w", 0.5), ("w/h", 0.0)):
        anchors = AnchorSet("x", (3.0, 4.0), (0.3, 1.0), convention)
        recall = Recall(anchors, canvas, STRIDES, 4, centre)
        recall.add(boxes[:40], classes[:40])
        recall.add(boxes[40:], classes[40:])
        figures = recall.result()

        shapes = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in STRIDES]
        grid = grid_anchors(shapes, STRIDES, (3.0, 4.0), (0.3, 1.0), convention, centre)
        grid = np.concatenate([np.asarray(level) for level in grid])
        best = box_oracle.pairwise(box_oracle.iou, boxes, grid).max(axis=1)
        assert figures["mean_iou/grid"] == pytest.approx(best.mean(), rel=1e-5)
        for threshold in (0.5, 0.7):
            hits = best >= threshold
            assert 0.02 < hits.mean() < 0.98
            assert figures[f"recall@{threshold}/grid"] == pytest.approx(hits.mean())
            by_class = np.mean([hits[classes == c].mean() for c in range(3)])
            assert figures[f"class_mean_recall@{threshold}/grid"] == pytest.approx(by_class)
            assert figures[f"recall@{threshold}/shape"] >= figures[f"recall@{threshold}/grid"]


def test_kmeans_finds_the_best_of_all_partitions():
    rng = np.random.default_rng(1)
    values, weights = np.sort(rng.normal(size=9)), rng.integers(0, 5, 9).astype(float)

    def cost(centres):
        return (weights * np.abs(values[:, None] - np.array(centres)).min(axis=1) ** 2).sum()

    used = weights > 0
    candidates = []
    for cuts in itertools.combinations(range(1, used.sum()), 2):
        parts = np.split(np.arange(used.sum()), cuts)
        means = [np.average(values[used][p], weights=weights[used][p]) for p in parts]
        candidates.append(cost(means))
    assert cost(kmeans_1d(values, weights, 3)) == pytest.approx(min(candidates))


def test_planted_anchors_are_found():
    rng = np.random.default_rng(2)
    scale = rng.choice([6.0, 9.0], 4000)
    ratio = rng.choice([0.25, 1.0, 3.0], 4000)
    side = scale * rng.choice(STRIDES, 4000)
    noise = np.exp(rng.normal(0, 0.03, (2, 4000)))
    shapes = ShapeHistograms()
    shapes.add(side / np.sqrt(ratio) * noise[0], side * np.sqrt(ratio) * noise[1])
    np.testing.assert_allclose(best_ratios(shapes, 3), [0.25, 1.0, 3.0], rtol=0.01)
    np.testing.assert_allclose(best_scales(shapes, STRIDES, 2), [6.0, 9.0], rtol=0.01)


def test_sizes_are_those_of_training():
    sizes = np.random.default_rng(3).integers(1, 3000, (200, 2))
    landscape, portrait = orientations((800, 1333))
    expected = [
        placement.fit((height, width), portrait if height > width else landscape).full
        for height, width in sizes.tolist()
    ]
    np.testing.assert_array_equal(fitted_sizes(sizes, (800, 1333)), expected)


def test_command_writes_the_three_sets(tmp_path):
    rng = np.random.default_rng(4)
    with DatasetWriter(tmp_path / "set", "x", ["a", "b"], ["a", "b"], None, "") as writer:
        for i in range(30):
            corners = rng.uniform(0, 0.5, (4, 2))
            boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.5, (4, 2))], axis=1)
            writer.add_image(f"{i}", f"{i}.jpg", (480, 640), boxes, rng.integers(0, 2, 4))
        writer.add_split("train", range(30))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.select_anchors",
            f"--dataset={tmp_path / 'set'}",
            "--canvas=400,640",
            "--num_ratios=3",
            "--num_scales=2",
            f"--output={tmp_path / 'x.json'}",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["boxes"] == 120 and content["images"] == 30
    chosen = content["sets"]["chosen"]
    assert (len(chosen["scales"]), len(chosen["ratios"]), chosen["anchors"]) == (2, 3, 6)
    assert set(content["sets"]) == {"chosen", "usual 3", "paper 18, h/w", "paper 18, w/h"}
    assert chosen["recall@0.5/grid"] > content["sets"]["usual 3"]["recall@0.5/grid"]
    assert "recall@0.5" in result.stdout
