"""Boxes of a detections table beside the annotated ones, in training and piece by piece."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.data.input import proposal_batches, train_batches
from common.data.plans.plan import train_plan
from common.data.proposals import TableBoxes
from common.tables import DetectionsReader, DetectionsWriter
from tests import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny"))


def data_settings(**changes):
    return dataclasses.replace(tiny.settings("refine").data, num_threads=2, **changes)


def write(path: Path, boxes: dict[str, np.ndarray]) -> DetectionsReader:
    with DetectionsWriter(path, {}) as writer:
        for image_id, values in boxes.items():
            scores = np.linspace(1, 0, len(values))
            writer.add(image_id, ["any"] * len(values), scores, values)
    return DetectionsReader(path)


def test_proposals_are_mirrored_and_scaled_like_the_annotated_boxes(dataset, tmp_path):
    annotated = {
        dataset.image_id(i): dataset.image_boxes(i)[0] for i in range(0, dataset.num_images, 2)
    }
    boxes = TableBoxes(write(tmp_path / "x.parquet", annotated), dataset)
    data = data_settings(scale_jitter=(0.7, 1.3))
    plan = train_plan(dataset, data, 0)
    some = 0
    for batch in train_batches(dataset, plan, data, seed=0, num_steps=5, proposals=boxes):
        assert batch["proposals"].shape == (4, 8, 4)
        for slot, image in enumerate(batch["image_index"]):
            proposals = batch["proposals"][slot][batch["proposal_valid"][slot]]
            if image % 2:  # not covered
                assert not len(proposals)
            else:
                np.testing.assert_array_equal(
                    proposals, batch["gt_boxes"][slot][batch["gt_valid"][slot]]
                )
                some += len(proposals)
    assert some > 8


def test_the_best_proposals_are_trained_on(dataset, tmp_path):
    low = np.linspace(0, 0.5, 30)[:, None]
    many = np.concatenate([low, low, low + 0.3, low + 0.3], axis=1)
    boxes = TableBoxes(write(tmp_path / "x.parquet", {dataset.image_id(2): many}), dataset)
    data = data_settings(flip=False)
    plan = train_plan(dataset, data, 0)
    for batch in train_batches(dataset, plan, data, seed=0, num_steps=3, proposals=boxes):
        for slot in np.flatnonzero(batch["image_index"] == 2):
            np.testing.assert_allclose(batch["proposals"][slot], many[:8] * 64, rtol=1e-5)
            return


def test_pieces_put_together_are_the_table(dataset, tmp_path):
    rng = np.random.default_rng(0)
    tables = {}
    for image, count in ((1, 17), (5, 0), (4, 8), (9, 3)):
        low = rng.uniform(0, 0.5, (count, 2))
        tables[dataset.image_id(image)] = np.concatenate([low, low + 0.2], axis=1)
    reader = write(tmp_path / "x.parquet", tables)
    whole = np.concatenate([boxes for _, boxes in sorted(tables.items())])
    for places in (range(4), range(1, 3)):
        boxes = TableBoxes(reader, dataset, places)
        images, first, sizes = boxes.pieces(places, 8)
        batches, members = proposal_batches(dataset, boxes, places, data_settings(), batch_size=2)
        batches = list(batches)
        np.testing.assert_array_equal(members.ravel()[: len(images)], np.arange(len(images)))
        assert len(batches) == -(-len(images) // 2)
        fields = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        np.testing.assert_array_equal(fields["image_index"][: len(images)], images)
        assert (fields["image_index"][len(images) :] == -1).all()
        valid = fields["proposal_valid"]
        np.testing.assert_array_equal(valid.sum(axis=1)[: len(sizes)], sizes)
        rows = slice(0, None) if len(places) == 4 else slice(17, 25)
        np.testing.assert_allclose(fields["proposals"][valid] / 64, whole[rows], atol=1e-6)
