"""Steps of their own for photos of which only image-level labels are used; half-labelled sets."""

from fractions import Fraction

import numpy as np
import pytest

from common.data.dataset import ABSENT, PRESENT, Dataset, DatasetWriter
from common.data.half_labelled import divide, write_half_labelled
from common.data.labels import VerifiedLabels
from common.data.plans.class_index import labelled_classes
from common.data.plans.plan import train_plan
from common.data.plans.step_kinds import StepKinds
from common.data.settings import LabelStepSettings, SourceSettings
from common.io.errors import UserError
from tests.commands import refusal, run
from tests.common.data.factories import data_settings

CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """24 photos: of every three one of a cat, one of a dog, and one with labels alone."""
    directory = tmp_path_factory.mktemp("set") / "set"
    with DatasetWriter(directory, "set", CLASSES, CLASSES, None) as writer:
        for i in range(24):
            boxed = [[i % 3], [i % 3], []][i % 3]
            size = (4, 6) if i % 2 else (6, 4)
            labels, states = ([1, 0], [PRESENT, ABSENT]) if i % 3 == 2 else ([], [])
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(boxed), 1))
            writer.add_image(
                f"{i}",
                f"{i}.jpg",
                size,
                boxes,
                boxed,
                label_classes=labels,
                label_confidences=states,
            )
        writer.add_split("train", range(24))
        writer.add_split("boxed", [i for i in range(24) if i % 3 != 2])
    return Dataset.open(directory)


@pytest.fixture(scope="module")
def half(dataset, tmp_path_factory) -> Dataset:
    output = tmp_path_factory.mktemp("half") / "half"
    run("scripts.make_half_labelled", f"--dataset={dataset.directory}", f"--output={output}")
    return Dataset.open(output)


def mixed(dataset, share=0.4, canvas=(), sampler="class_aware", **labels):
    sources = (
        SourceSettings(split="boxes"),
        SourceSettings(**{"split": "labels", "annotations": "labels"} | labels),
    )
    settings = data_settings(
        dir=str(dataset.directory),
        sources=sources,
        label_steps=LabelStepSettings(share, canvas),
        sampler=sampler,
        image_labels=True,
        batch_size=4,
        canvas=(64, 96),
        scale_jitter=(0.8, 1.0),
    )
    return train_plan(dataset, settings, 7)


def test_the_share_of_the_steps_holds_in_every_round_and_steps_are_counted_by_kind():
    kinds = StepKinds(Fraction(2, 5), 3)
    steps = [kinds.of_step(step) for step in range(100)]
    is_label = np.array([labelled for labelled, _ in steps])
    assert (is_label.reshape(-1, 5).sum(axis=1) == 2).all()
    assert len({tuple(row) for row in is_label.reshape(-1, 5)}) > 3  # not the same in each round
    for kind in (True, False):
        numbers = [number for labelled, number in steps if labelled == kind]
        assert numbers == list(range(len(numbers)))


def test_label_steps_have_photos_with_labels_alone_on_their_canvas(half):
    plan = mixed(half, canvas=(32, 48))
    boxes, labels = set(half.split("boxes").tolist()), set(half.split("labels").tolist())
    seen = set()
    for step in range(60):
        images, classes, sources = plan.batch(step)
        wanted = labels if plan.labels_only(step) else boxes
        assert set(images.tolist()) <= wanted and (sources == plan.labels_only(step)).all()
        assert set(plan.canvas(step)) == ({32, 48} if plan.labels_only(step) else {64, 96})
        seen |= set(images.tolist())
        if plan.labels_only(step):  # drawn for a class that is verified there
            for image, class_ in zip(images, classes, strict=True):
                verified, states = half.image_labels(int(image))
                assert states[list(verified).index(class_)] == PRESENT
    assert seen == boxes | labels
    # An epoch shows each photo with boxes once, whatever the share of the other steps.
    assert plan.steps_per_epoch == -(-(len(boxes) // 4) * 5 // 3)


def test_a_half_labelled_set_keeps_what_it_is_made_of(dataset, half):
    boxes, labels = half.split("boxes"), half.split("labels")
    assert len(boxes) == 8 and len(labels) == 16
    assert sorted([*boxes, *labels]) == list(range(24))
    assert {i for i in range(24) if i % 3 == 2} <= set(labels.tolist())
    source = mixed(half).label_sources[0]
    for image in range(24):
        np.testing.assert_array_equal(half.image_boxes(image)[0], dataset.image_boxes(image)[0])
        expected = [0] * 3
        if image % 3 == 2:
            expected = [-1, 1, 0]
        else:
            expected[image % 3] = 1
        assert VerifiedLabels(half).of_image(source, image).tolist() == expected
    assert labelled_classes(source, CLASSES).endswith(
        "16 photos, 2 classes are verified on 16 of them, on none: bird; 1 verified absent on 8"
    )
    assert divide(dataset, "train", 0.5, 1).boxes.tolist() != boxes.tolist()
    assert divide(dataset, "train", 1.0, 0).labels.tolist() == list(range(2, 24, 3))


def test_every_class_is_known_where_all_are_annotated(dataset, tmp_path):
    halves = divide(dataset, "boxed", 0.5, 0)
    write_half_labelled(dataset, tmp_path / "half", "boxed", halves, absent=True)
    half = Dataset.open(tmp_path / "half")
    assert half.image_labels(0)[1].tolist() == [PRESENT, ABSENT, ABSENT]
    assert half.image_labels(2)[0].tolist() == [0, 1]  # no photo of the split: as it was


@pytest.mark.parametrize(("flags", "lacking"), [([], 2), (["--noabsent"], 0)])
def test_halves_of_exhaustive_sets_say_what_is_absent(tmp_path, flags, lacking):
    with DatasetWriter(
        tmp_path / "x", "x", CLASSES, CLASSES, None, extra={"exhaustive": True}
    ) as writer:
        for i in range(4):
            writer.add_image(f"{i}", f"{i}.jpg", (4, 4), np.array([[0.1, 0.1, 0.5, 0.5]]), [1])
        writer.add_split("train", range(4))
    folders = f"--dataset={tmp_path / 'x'}", f"--output={tmp_path / 'half'}"
    run("scripts.make_half_labelled", *folders, *flags)
    (source,) = mixed(Dataset.open(tmp_path / "half")).label_sources
    note = "" if lacking else " (note: nothing there says what is not on a photo)"
    assert labelled_classes(source, CLASSES).endswith(
        "2 photos, 1 classes are verified on 2 of them, on none: cat, bird; "
        f"{lacking} verified absent on {lacking}{note}"
    )


def test_photos_whose_labels_are_of_all_of_them_are_not_cropped():
    sources = SourceSettings(split="boxes"), SourceSettings(split="labels", annotations="labels")
    message = "scale_jitter: found .* expected at most 1 with a source of annotations 'labels'"
    with pytest.raises(UserError, match=message):
        data_settings(sources=sources, scale_jitter=(0.8, 1.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": "boxes"}, "none has annotations 'labels', expected at least one"),
        ({"split": "unlabelled"}, "no photo of split 'unlabelled' .* has an image-level label"),
        ({"split": "negative"}, "have no labels of classes that are present"),
    ],
)
def test_sources_without_labels_are_refused_in_one_line(tmp_path, changes, message):
    with DatasetWriter(tmp_path / "x", "x", CLASSES, CLASSES, None) as writer:
        box = np.array([[0.1, 0.1, 0.5, 0.5]])
        writer.add_image("a", "a.jpg", (4, 4), box, [0])
        writer.add_image("b", "b.jpg", (4, 4), label_classes=[0], label_confidences=[ABSENT])
        for name, images in {
            "boxes": [0],
            "labels": [1],
            "unlabelled": [0],
            "negative": [1],
        }.items():
            writer.add_split(name, images)
    with pytest.raises(UserError, match=message) as error:
        mixed(Dataset.open(tmp_path / "x"), **changes)
    assert "\n" not in str(error.value)


def test_label_steps_without_sources_and_halves_without_photos_are_refused(dataset, tmp_path):
    settings = data_settings(label_steps=LabelStepSettings(0.5, ()))
    with pytest.raises(UserError, match="names no source of annotations 'labels'"):
        train_plan(dataset, settings, 0)
    line = refusal(
        "scripts.make_half_labelled",
        f"--dataset={dataset.directory}",
        f"--output={tmp_path / 'x'}",
        "--split=boxed",
        "--share=1",
    )
    assert "no photo in the half 'labels', expected some (--share)" in line
