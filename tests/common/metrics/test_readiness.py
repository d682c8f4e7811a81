"""What an evaluation needs is missed before a training, not after it."""

import dataclasses

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics.readiness import check_metric, evaluation_split
from tests import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return Dataset.open(tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny", num_images=4))


def with_splits(dataset: Dataset, *names: str) -> Dataset:
    return dataclasses.replace(dataset, splits=list(names))


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_the_usual_split_is_found_under_another_name_and_said(dataset, name):
    said = []
    other = with_splits(dataset, "train", name)
    assert evaluation_split(other, "validation", lambda text, **_: said.append(text)) == name
    assert len(said) == 1 and f"{name!r} is taken" in said[0]
    assert evaluation_split(other, name) == name


@pytest.mark.parametrize(("splits", "name"), [(["train"], "validation"), (["train", "val"], "dev")])
def test_other_names_are_refused_with_those_that_are_there(dataset, splits, name):
    with pytest.raises(UserError) as error:
        evaluation_split(with_splits(dataset, *splits), name)
    text = str(error.value)
    assert f"no split {name!r}; it has {', '.join(splits)}" in text
    assert "--config.evaluation.every_epochs=-1" in text


def test_what_a_metric_lacks_is_named(dataset, tmp_path):
    for metric in ("openimages", "coco"):
        check_metric(dataset, "validation", metric)
    for metric, text in (
        ("coco_masks", "no ground-truth masks"),
        ("openimages_masks", "no ground-truth masks"),
        ("lvis", "no frequency of the classes"),
    ):
        with pytest.raises(UserError, match=text):
            check_metric(dataset, "validation", metric)
    unknown = dataclasses.replace(dataset, image_sizes=np.zeros_like(dataset.image_sizes))
    with pytest.raises(UserError, match="size of image 'photo003' is unknown"):
        check_metric(unknown, "validation", "coco")
    with DatasetWriter(tmp_path / "empty", "empty", ["a"], ["a"], None) as writer:
        writer.add_image("x", "x.jpg", (8, 8), np.zeros((0, 4)), [])
        writer.add_split("validation", [0])
    with pytest.raises(UserError, match="no ground-truth boxes"):
        check_metric(Dataset.open(tmp_path / "empty"), "validation", "openimages")
