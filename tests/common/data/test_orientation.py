"""Canvases of the steps: which photos meet on them, how often, and in which order."""

import typing

import numpy as np
import pytest

from common.data.canvases import is_portrait, train_canvases
from common.data.dataset import Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from common.data.settings import Sampler
from tests.common.data.factories import data_settings

SAMPLERS = typing.get_args(Sampler)
CANVAS = (30, 50)
LANDSCAPE, PORTRAIT = CANVAS, CANVAS[::-1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """100 photos, 30 of them portraits, one of unknown size; class 3 has landscapes only, class 4
    portraits only, class 5 one portrait among 20 landscapes; every seventh photo has no box."""
    directory = tmp_path_factory.mktemp("orientation") / "set"
    labels = list("abcdef")
    with DatasetWriter(directory, "set", labels, labels, None) as writer:
        for i in range(100):
            upright = i % 10 >= 7
            classes = [] if i % 7 == 0 else [i % 3, 4 if upright else 3]
            if classes and (10 <= i < 34 and not upright or i == 38):
                classes.append(5)
            size = (0, 0) if i == 1 else (40, 30) if upright else (30, 40) if i % 2 else (30, 30)
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(classes), 1))
            writer.add_image(f"{i:03d}", f"{i}.jpg", size, boxes, classes)
        writer.add_split("train", range(100))
        writer.add_split("landscape", [i for i in range(100) if i % 10 < 7])
        writer.add_split("portrait", [i for i in range(100) if i % 10 >= 7])
    return Dataset.open(directory)


def plan_of(dataset, sampler, seed=3, **changes):
    fields = {"sampler": sampler, "batch_size": 8, "canvas": CANVAS} | changes
    return train_plan(dataset, data_settings(**fields), seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_step_can_be_asked_for_alone(dataset, sampler):
    plan, again = (plan_of(dataset, sampler, scales=(20, 30)) for _ in range(2))
    expected = [(plan.canvas(step), plan.batch(step)) for step in range(40)]
    for step in (39, 0, 17, 17):
        assert again.canvas(step) == expected[step][0]
        np.testing.assert_array_equal(again.batch(step), expected[step][1])


def test_uniform_steps_have_photos_of_their_orientation_each_once_an_epoch(dataset):
    plan = plan_of(dataset, "uniform", batch_size=5)
    assert plan.steps_per_epoch == 20
    upright = is_portrait(dataset.image_sizes)
    for epoch in range(4):
        seen = []
        for step in range(20 * epoch, 20 * epoch + 20):
            images = plan.batch(step).images
            assert (upright[images] == (plan.canvas(step) == PORTRAIT)).all()
            seen += images.tolist()
        assert sorted(seen) == list(range(100))


def test_photos_of_unknown_size_are_taken_as_landscape(dataset):
    plan = plan_of(dataset, "uniform")
    steps = [step for step in range(26) if 1 in plan.batch(step).images]
    assert steps and all(plan.canvas(step) == LANDSCAPE for step in steps)


@pytest.mark.parametrize("sampler", ["class_aware", "full_class_batch"])
def test_classes_draw_photos_of_the_orientation_of_the_step(dataset, sampler):
    plan = plan_of(dataset, sampler, batch_size=12)
    upright = is_portrait(dataset.image_sizes)
    draws = []
    for step in range(400):
        images, classes, _ = plan.batch(step)
        portrait = plan.canvas(step) == PORTRAIT
        for image, class_ in zip(images, classes, strict=True):
            assert class_ in dataset.image_boxes(image)[1]
            draws.append((class_, portrait, upright[image], image))
        if sampler == "full_class_batch":
            assert set(classes) == set(range(6))
    classes, portrait, fits, images = np.array(draws).T
    counts = np.bincount(classes)
    assert np.ptp(counts) <= 2 * 2  # at most one round of each orientation is not complete
    ordinary = classes < 3
    assert (portrait == fits)[ordinary].all()
    assert not fits[classes == 3].any() and portrait[classes == 3].any()  # fitted into the other
    assert fits[classes == 4].all() and not portrait[classes == 4].all()
    # The only portrait of a class is not drawn more than twice as often as its other photos.
    of_class = np.bincount(images[classes == 5], minlength=100)
    members = np.flatnonzero(of_class)
    assert 38 in members and of_class[38] <= 2.1 * of_class[members].mean()
    # Of each orientation, the images of a class come equally often, up to one.
    for class_ in range(3):
        for orientation in (0, 1):
            own = np.bincount(images[(classes == class_) & (portrait == orientation)])
            assert np.ptp(own[own > 0]) <= 1


@pytest.mark.parametrize("portraits", [(5, 90), (50, 1), (40, 20), (0, 30)])
def test_an_expert_draws_photos_of_either_orientation_equally_often(tmp_path, portraits):
    """However many of those with objects, and of those without, are portraits."""
    count, labels = 100, ["a", "b"]
    with DatasetWriter(tmp_path / "set", "set", labels, labels, None) as writer:
        for kind, upright in enumerate(portraits):
            for i in range(count):
                size, boxes = (40, 30) if i < upright else (30, 40), np.zeros((0, 4))
                classes = [] if kind else [i % 2]
                if classes:
                    boxes = np.array([[0.1, 0.1, 0.5, 0.5]])
                writer.add_image(f"{kind}-{i}", f"{kind}-{i}.jpg", size, boxes, classes)
        writer.add_split("train", range(2 * count))
    plan = plan_of(Dataset.open(tmp_path / "set"), "expert", positive_share=0.25)
    steps = 1000
    draws = np.zeros(2 * count)
    for step in range(steps):
        np.add.at(draws, plan.batch(step).images, 1)
    for kind, share in enumerate((0.25, 0.75)):
        average = share * 8 * steps / count
        of_kind = draws[kind * count : (kind + 1) * count]
        upright = portraits[kind]
        assert abs(of_kind.sum() - share * 8 * steps) < 16
        for part in (of_kind[:upright], of_kind[upright:]):
            assert not len(part) or abs(part.mean() / average - 1) < 0.1


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
@pytest.mark.parametrize("split", ["landscape", "portrait"])
def test_splits_of_one_orientation_have_one_canvas(dataset, sampler, split):
    plan = plan_of(dataset, sampler, train_split=split)
    expected = LANDSCAPE if split == "landscape" else PORTRAIT
    assert {plan.canvas(step) for step in range(30)} == {expected}
    drawn = np.concatenate([plan.batch(step).images for step in range(30)])
    assert set(drawn) <= set(dataset.split(split))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_square_canvas_has_the_plan_of_no_orientations(dataset, sampler):
    square = plan_of(dataset, sampler, canvas=(50, 50))
    assert {square.canvas(step) for step in range(40)} == {(50, 50)}
    assert square.portrait == 0 and square.streams[1] is None


def test_every_short_side_comes_once_a_round_in_either_orientation(dataset):
    plan = plan_of(dataset, "uniform", scales=(20, 30, 40))
    canvases = [plan.canvas(step) for step in range(300)]
    shorts = np.array([min(canvas) for canvas in canvases]).reshape(-1, 3)
    assert (np.sort(shorts, axis=1) == [20, 30, 40]).all()
    assert len({tuple(order) for order in shorts.tolist()}) == 6
    assert set(canvases) == {(20, 33), (33, 20), (30, 50), (50, 30), (40, 67), (67, 40)}
    plain = plan_of(dataset, "uniform")
    for step in range(20):  # the short side does not change which photos are drawn
        np.testing.assert_array_equal(plan.batch(step), plain.batch(step))


def test_all_shapes_of_a_run_are_listed_padded_and_once():
    settings = data_settings(canvas=(800, 1333), scales=(640, 672, 800), pad_multiple=32)
    assert train_canvases(settings) == [
        (640, 1088), (1088, 640), (672, 1120), (1120, 672), (800, 1344), (1344, 800)
    ]  # fmt: skip
    assert train_canvases(data_settings(canvas=(512, 512))) == [(512, 512)]
