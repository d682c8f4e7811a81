"""The refiner moves the boxes of a table and leaves all else of it as it was."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from common.data.dataset import Dataset
from common.data.proposals import TableBoxes
from common.io.errors import UserError
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.training import distributed
from common.training.step import variable_shapes
from detection.batch_fields import init_shapes
from detection.models.box_refiner import jitter
from detection.models.faster_rcnn import build
from detection.refine import mean_overlaps, open_proposals, refine_table
from detection.settings import read_run
from tests import tiny
from tests.commands import ROOT, run

STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny"))


def random_boxes(rng, count: int) -> np.ndarray:
    low = rng.uniform(0, 0.6, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.1, 0.4, (count, 2))], axis=1)


@pytest.fixture(scope="module")
def table(dataset, tmp_path_factory) -> Path:
    """Four images in table order: 21 boxes (8 are looked at at once), none, 8, 9."""
    path = tmp_path_factory.mktemp("tables") / "x.parquet"
    rng = np.random.default_rng(0)
    metadata = {"model": "ensemble", "split": "some", "expanded": True}
    with DetectionsWriter(path, metadata, masks=True) as writer:
        for index, count in ((3, 21), (4, 0), (6, 8), (11, 9)):
            scores = np.round(rng.uniform(0, 1, count), 1)  # with ties
            labels = rng.choice(["red", "an unknown label"], count)
            boxes = random_boxes(rng, count)
            boxes[2:3, 2] = boxes[2:3, 0]  # no area
            masks = [bytes([65 + i]) for i in range(count)]
            sizes = np.full((count, 2), 64, np.int32)
            writer.add(dataset.image_id(index), labels, scores, boxes, masks, sizes)
    return path


@pytest.fixture(scope="module")
def refiner(dataset):
    """Settings, model, mesh, and variables with regressors of constant deltas."""
    config = tiny.get_config("refine")
    config.evaluation.batch_size = 2
    settings = read_run(config)
    model = build(settings.model, dataset.num_classes, distributed.DATA_AXIS)
    shapes = variable_shapes(model, init_shapes(settings.data))

    def with_deltas(deltas):
        variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        for name in ("box_head", "box_head2", "box_head3"):
            variables["params"][name]["regressor"]["bias"][:] = deltas
        return variables

    return settings, model, distributed.make_mesh(jax.devices()[:1]), with_deltas


def refined(refiner, dataset, table, deltas, output):
    settings, model, mesh, with_deltas = refiner
    refine_table(
        settings,
        model,
        with_deltas(deltas),
        dataset,
        table,
        mesh,
        output,
        step=7,
        say=lambda *_, **__: None,
    )
    return read_detections(output, masks=True)


def assert_other_columns_stay(before, after):
    assert list(after.image_ids) == list(before.image_ids)
    np.testing.assert_array_equal(after.image_index, before.image_index)
    names = [np.array(t.labels)[t.label_index] for t in (before, after)]
    np.testing.assert_array_equal(*names)
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(after.masks, before.masks)
    np.testing.assert_array_equal(after.mask_sizes, before.mask_sizes)


def test_zero_deltas_give_the_table_back(refiner, dataset, table, tmp_path):
    before = read_detections(table, masks=True)
    after = refined(refiner, dataset, table, np.zeros(4), tmp_path / "y.parquet")
    assert_other_columns_stay(before, after)
    np.testing.assert_allclose(after.boxes, before.boxes, atol=1e-6)
    refinement = after.metadata["refinement"]
    assert (refinement["model"], refinement["step"]) == ("tiny_refine", 7)
    assert after.metadata["model"] == "ensemble" and after.metadata["expanded"] is True


def test_each_stage_moves_the_boxes_of_the_one_before(refiner, dataset, table, tmp_path):
    deltas = np.array([1.0, -0.5, 0.4, 1.5])
    before = read_detections(table, masks=True)
    after = refined(refiner, dataset, table, deltas, tmp_path / "y.parquet")
    assert_other_columns_stay(before, after)
    expected = before.boxes.astype(np.float64) * 64
    has_area = (expected[:, 2:] > expected[:, :2]).all(axis=1)
    for stds in STDS:
        dx, dy, dw, dh = deltas * stds
        x0, y0, x1, y1 = expected.T
        width, height = x1 - x0, y1 - y0
        x, y = (x0 + x1) / 2 + dx * width, (y0 + y1) / 2 + dy * height
        half_width, half_height = width * np.exp(dw) / 2, height * np.exp(dh) / 2
        moved = [x - half_width, y - half_height, x + half_width, y + half_height]
        expected = np.clip(np.stack(moved, axis=1), 0, 64)
    assert (~has_area).sum() == 3
    np.testing.assert_allclose(after.boxes[has_area], expected[has_area] / 64, atol=1e-5)
    np.testing.assert_array_equal(after.boxes[~has_area], before.boxes[~has_area])


def test_a_box_that_would_leave_the_photo_stays(refiner, dataset, table, tmp_path):
    before = read_detections(table, masks=True)
    after = refined(refiner, dataset, table, [1e3, 0, 0, 0], tmp_path / "y.parquet")
    np.testing.assert_array_equal(after.boxes, before.boxes)


def test_jittered_boxes_lie_around_the_truth_inside_the_photo():
    keys = jax.random.split(jax.random.key(0), 2)
    boxes = np.array([[[20, 20, 40, 30], [0, 0, 0, 0]]] * 2, np.float32)
    valid = np.array([[True, False]] * 2)
    size = np.array([[64, 64], [32, 64]], np.float32)
    moved = jitter(keys, boxes, valid, size, copies=500, shift=0.1, scale=0.2)
    assert moved.boxes.shape == (2, 1000, 4) and moved.valid.sum() == 1000
    first, second = (np.asarray(moved.boxes[i][moved.valid[i]]) for i in range(2))
    centres = (first[:, :2] + first[:, 2:]) / 2
    np.testing.assert_allclose(centres.mean(axis=0), [30, 25], atol=0.3)
    np.testing.assert_allclose(centres.std(axis=0), [2, 1], rtol=0.15)
    np.testing.assert_allclose(np.log((first[:, 2] - first[:, 0]) / 20).std(), 0.2, rtol=0.15)
    assert second[:, 3].max() == 32


def test_mean_overlaps_are_those_of_the_matched_boxes(dataset, tmp_path):
    image = int(dataset.split("validation")[0])
    truth = dataset.image_boxes(image)[0][0]
    width = truth[2] - truth[0]
    tables = []
    for name, share in (("a", 0.2), ("b", 0.1)):
        with DetectionsWriter(tmp_path / f"{name}.parquet", {}) as writer:
            near, far = truth - [0, 0, share * width, 0], [0, 0, 0.01, 0.01]
            writer.add(dataset.image_id(image), ["x", "x"], [0.9, 0.8], np.array([near, far]))
        tables.append(tmp_path / f"{name}.parquet")
    found = mean_overlaps(dataset, "validation", *tables)
    assert found["Refinement/boxes"] == 1
    np.testing.assert_allclose(found["Refinement/IoU_before"], 0.8, atol=1e-5)
    np.testing.assert_allclose(found["Refinement/IoU_after"], 0.9, atol=1e-5)


def write_jittered(dataset: Dataset, path: Path, copies: int, seed: int) -> Path:
    """A table of moved copies of the annotated boxes."""
    rng = np.random.default_rng(seed)
    with DetectionsWriter(path, {"model": "jitter"}) as writer:
        for index in range(dataset.num_images):
            boxes, classes, _ = dataset.image_boxes(index)
            boxes, classes = np.tile(boxes, (copies, 1)), np.tile(classes, copies)
            sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            boxes = np.clip(boxes + rng.uniform(-0.2, 0.2, boxes.shape) * sides, 0, 1)
            labels = np.array(dataset.class_labels)[classes]
            writer.add(dataset.image_id(index), labels, rng.uniform(0, 1, len(boxes)), boxes)
    return path


@pytest.mark.slow
def test_training_on_a_table_brings_its_boxes_closer_to_the_truth(dataset, tmp_path):
    proposals = write_jittered(dataset, tmp_path / "train.parquet", copies=3, seed=1)
    scored = write_jittered(dataset, tmp_path / "scored.parquet", copies=3, seed=2)
    common = [
        f"--config={ROOT / 'tests' / 'tiny.py'}:refine",
        f"--config.data.dir={dataset.directory}",
        f"--workdir={tmp_path / 'work'}",
    ]
    text = run(
        "detection.train",
        *common,
        f"--config.data.proposals={proposals}",
        "--config.data.eval_split=train",
        f"--config.evaluation.proposals={scored}",
        "--config.optimizer.num_epochs=30",
        "--config.optimizer.decay_epochs=(27,)",
        "--config.optimizer.learning_rate_per_image=0.0025",
        "--config.optimizer.warmup_epochs=5",
        "--config.checkpoint.every_steps=0",
        "--config.log.every_steps=5",
    )
    assert "covers 9 of 9 training images" in text
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    result = metrics[-1]
    gain = result["evaluation/Refinement/IoU_after"] - result["evaluation/Refinement/IoU_before"]
    assert gain > 0.03, "of 0.69 before"
    output = tmp_path / "y.parquet"
    run("detection.export", *common, f"--proposals={scored}", f"--output={output}")
    before, after = read_detections(scored), read_detections(output)
    np.testing.assert_array_equal(after.scores, before.scores)
    found = mean_overlaps(dataset, "train", scored, output)
    assert found["Refinement/IoU_after"] == result["evaluation/Refinement/IoU_after"]


def test_what_is_missing_is_said_before_training(dataset, table, tmp_path):
    config = tiny.get_config("refine")
    with pytest.raises(UserError, match="config.data.proposals: empty, expected a detections tab"):
        open_proposals(read_run(config), dataset)
    config.data.proposals = config.evaluation.proposals = str(table)
    with pytest.raises(UserError, match="covers 1 of the 3 images of split 'validation'"):
        open_proposals(read_run(config), dataset)
    config.evaluation.proposals = ""
    opened = open_proposals(read_run(config), dataset, lambda *_, **__: None)
    assert isinstance(opened, TableBoxes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.split_after", "c3", "config.model.split_after: found 'c3', expected ''"),
        ("data.max_proposals", 0, "config.data.max_proposals: found 0, expected at least 1"),
        ("test_time.scales", (600,), "config.test_time.scales: found (600,), expected ()"),
    ],
)
def test_what_a_refiner_cannot_do_is_refused(field, value, message):
    config = tiny.get_config("refine")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(config)


def test_a_table_of_other_images_is_refused(dataset, tmp_path):
    with DetectionsWriter(tmp_path / "x.parquet", {}) as writer:
        writer.add("someone else's", [], np.zeros(0), np.zeros((0, 4)))
    with pytest.raises(UserError, match='x.parquet: image "someone else\'s" is not in'):
        TableBoxes(DetectionsReader(tmp_path / "x.parquet"), dataset)
