"""What TensorBoard shows of an evaluation."""

import dataclasses

import numpy as np

from common.data.dataset import Dataset
from common.tables import DetectionsWriter
from detection.evaluate import evaluation_pictures
from tests import tiny


def test_a_few_photos_are_drawn_and_broken_ones_are_passed_over(tmp_path):
    dataset = Dataset.open(tiny.write_dataset(tmp_path / "data"))
    members = dataset.split("validation")
    with DetectionsWriter(tmp_path / "validation.parquet", {"model": "test"}) as writer:
        for index in members:
            box = np.array([[0.2, 0.2, 0.6, 0.6]], np.float32)
            writer.add(dataset.image_id(index), ["red"], np.float32([0.9]), box)
    settings = tiny.settings()
    evaluation = dataclasses.replace(settings.evaluation, num_pictures=len(members) - 1)
    settings = dataclasses.replace(settings, evaluation=evaluation)
    pictures = evaluation_pictures(settings, dataset, tmp_path)
    assert len(pictures) == len(members) - 1
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.shape[0] == 1 and picture.shape[-1] == 3
    name = next(iter(pictures)).removeprefix("detections/")
    (index,) = dataset.find_images([name])
    with open(dataset.image_file(int(index)), "wb") as file:
        file.write(b"broken")
    left = evaluation_pictures(settings, dataset, tmp_path)
    assert f"detections/{name}" not in left and len(left) == len(pictures) - 1
