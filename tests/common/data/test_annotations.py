"""What a training batch says of its photos: objects, ignore regions, verified labels."""

import dataclasses
import itertools

import numpy as np
import pytest

from common.data import input as inputs
from common.data.dataset import CROWD, GROUP_OF
from common.data.dataset_format import ABSENT, NOT_EXHAUSTIVE, PRESENT
from common.data.labels import VerifiedLabels
from common.data.plans.plan import train_plan
from common.data.settings import SourceSettings
from common.data.sources import open_sources, single_source
from tests.common.data.factories import data_settings
from tests.common.data.small_sets import BOXES, HIERARCHY, LABELS, NO_BOXES, boxes_of, read, write


@pytest.mark.parametrize(
    ("group_of", "objects", "ignored"),
    [("ordinary", (0, 1), (2,)), ("ignore", (0,), (1, 2)), ("drop", (0,), (2,))],
)
def test_crowds_are_ignored_and_group_of_boxes_by_choice(tmp_path, group_of, objects, ignored):
    flags = [0, GROUP_OF, GROUP_OF | CROWD]
    dataset = write(tmp_path, "x", [{"boxes": BOXES[:3], "classes": [1, 1, 1], "flags": flags}])
    (batch,) = read(dataset, batch_size=1, group_of=group_of)
    assert boxes_of(batch, 0, "gt") == sorted(tuple(BOXES[i]) for i in objects)
    assert boxes_of(batch, 0, "ignore") == sorted(tuple(BOXES[i]) for i in ignored)
    assert batch["gt_group_of"][0].sum() == (group_of == "ordinary")


def test_boxes_beyond_the_limit_are_ignored_not_background(tmp_path):
    dataset = write(tmp_path, "x", [{"boxes": BOXES, "classes": [0, 1, 2, 3]}])
    for batch in read(dataset, num_steps=5, batch_size=1, max_boxes=3):
        objects, ignored = boxes_of(batch, 0, "gt"), boxes_of(batch, 0, "ignore")
        assert len(objects) == 3
        assert sorted(objects + ignored) == sorted(map(tuple, BOXES.tolist()))


def test_of_too_many_ignore_boxes_the_largest_are_kept_and_the_others_counted(tmp_path, capfd):
    flags = [GROUP_OF | CROWD] * 4
    dataset = write(tmp_path, "x", [{"boxes": BOXES, "classes": [0] * 4, "flags": flags}])
    settings = data_settings(flip=False, scale_jitter=(1.0, 1.0), batch_size=1, max_ignore=2)
    batches = inputs.train_batches(
        dataset, train_plan(dataset, settings, 0), settings, seed=0, num_steps=3
    )
    for batch in batches:
        assert boxes_of(batch, 0, "ignore") == sorted([tuple(BOXES[1]), tuple(BOXES[2])])
    assert batches.dropped_ignore_boxes == 3 * 2
    assert capfd.readouterr().err.count("4 ignore boxes, the largest 2 are used") == 1


def test_ignore_boxes_of_the_dataset_move_with_the_photo(tmp_path):
    """An object and a region at the same place stay together through flips, scales and crops."""
    photo = {"boxes": BOXES[3:], "classes": [0], "ignore": BOXES[3:]}
    dataset = write(tmp_path, "x", [photo])
    seen = set()
    for batch in read(dataset, num_steps=30, batch_size=1, flip=True, scale_jitter=(0.5, 1.5)):
        if batch["gt_valid"][0].any():
            assert boxes_of(batch, 0, "gt") == boxes_of(batch, 0, "ignore")
            seen.add(boxes_of(batch, 0, "gt")[0])
    assert len(seen) > 20


def expanded(boxes, labels):
    """What is known of each class, by walking from class to class."""
    parents = {"Dog": "Animal", "Puppy": "Dog", "Cat": "Animal"}

    def line(name):
        return [name, *(line(parents[name]) if name in parents else [])]

    present = {a for name in boxes for a in line(name)}
    present |= {a for name, state in labels.items() if state != ABSENT for a in line(name)}
    absent = {
        name for name in LABELS for a in line(name) if labels.get(a, PRESENT) == ABSENT
    } - present
    return [1 if name in present else -1 if name in absent else 0 for name in LABELS]


def test_verified_labels_are_those_of_the_walk_along_the_hierarchy(tmp_path):
    rng = np.random.default_rng(0)
    photos, expected = [], []
    for _ in range(40):
        boxes = rng.choice(LABELS, rng.integers(0, 3)).tolist()
        states = rng.choice([ABSENT, PRESENT, NOT_EXHAUSTIVE], 5).tolist()
        labels = dict(
            itertools.compress(zip(LABELS, states, strict=True), (rng.random(5) < 0.5).tolist())
        )
        photos.append(
            {
                "boxes": np.tile(BOXES[:1], (len(boxes), 1)),
                "classes": [LABELS.index(name) for name in boxes],
                "label_classes": [LABELS.index(name) for name in labels],
                "label_confidences": list(labels.values()),
            }
        )
        expected.append(expanded(boxes, labels))
    dataset = write(tmp_path, "x", photos)
    assert {value for row in expected for value in row} == {-1, 0, 1}
    (batch,) = read(dataset, batch_size=40, image_labels=True)
    assert batch["labels"].dtype == np.int8
    for slot, image in enumerate(batch["image_index"]):
        assert batch["labels"][slot].tolist() == expected[image]
    assert "labels" not in read(dataset)[0]


def test_what_exhaustive_annotations_do_not_box_is_absent(tmp_path):
    """But for what a region to ignore, or a box of a parent, may be."""
    photos = [
        {"boxes": BOXES[:2], "classes": [2, 4]},
        {"boxes": BOXES[:1], "classes": [0]},
        {"boxes": BOXES[:1], "classes": [4], "ignore": BOXES[1:2]},
        NO_BOXES,
    ]
    dataset = write(tmp_path, "x", photos)
    dataset.meta["exhaustive"] = True
    verified, source = VerifiedLabels(dataset), single_source(dataset, dataset.split("train"))
    assert [verified.of_image(source, i).tolist() for i in range(4)] == [
        [1, 1, 1, -1, 1],
        [1, 0, 0, 0, -1],
        [0, 0, 0, 0, 1],
        [-1] * 5,
    ]
    unknown = dataclasses.replace(source, known=np.arange(5) < 3)
    assert verified.of_image(unknown, 3).tolist() == [-1, -1, -1, 0, 0]
    alone = dataclasses.replace(source, has_boxes=False)
    assert verified.of_image(alone, 3).tolist() == [0] * 5


def test_classes_that_a_crop_cut_away_are_unknown(tmp_path):
    """A tree at the left and a puppy at the right, an animal by its label, no cat."""
    boxes = np.array([[0, 0.3, 0.2, 0.7], [0.8, 0.3, 1, 0.7]])
    labels = {"label_classes": [0, 3], "label_confidences": [PRESENT, ABSENT]}
    dataset = write(tmp_path, "x", [{"boxes": boxes, "classes": [4, 2], **labels}])
    tree, puppy = [0, 0, 0, -1, 1], [1, 1, 1, -1, 0]
    seen = set()
    for batch in read(
        dataset, 30, batch_size=1, image_labels=True, flip=True, scale_jitter=(0.9, 2.2)
    ):
        classes = sorted(batch["gt_classes"][0][batch["gt_valid"][0]].tolist())
        expected = {(2, 4): [1, 1, 1, -1, 1], (4,): tree, (2,): puppy, (): [0, 0, 0, -1, 0]}
        assert batch["labels"][0].tolist() == expected[tuple(classes)]
        seen.add(tuple(classes))
    assert {(2, 4), (2,), (4,)} <= seen


def test_a_label_without_a_box_is_of_the_whole_photo(tmp_path):
    labels = {"label_classes": [3, 4], "label_confidences": [PRESENT, PRESENT]}
    dataset = write(tmp_path, "x", [{"boxes": BOXES[:1], "classes": [4], **labels}])
    verified, source = VerifiedLabels(dataset), single_source(dataset, np.arange(1))
    for visible, cropped, expected in (
        ([True], False, [1, 0, 0, 1, 1]),
        ([False], False, [1, 0, 0, 1, 0]),  # turned out of the frame
        ([True], True, [0, 0, 0, 0, 1]),
        ([False], True, [0] * 5),
    ):
        found = verified.of_image(source, 0, np.array(visible), cropped=cropped)
        assert found.tolist() == expected


def test_labels_follow_every_node_of_a_class_with_two_parents(tmp_path):
    """Dog is listed below Pet too, where its children are not: a puppy is a pet all the same."""
    labels = [*LABELS, "Pet"]
    pet = {"LabelName": "Pet", "Subcategory": [{"LabelName": "Dog"}]}
    hierarchy = {"LabelName": "root", "Subcategory": [*HIERARCHY["Subcategory"], pet]}
    photos = [
        NO_BOXES | {"label_classes": [label], "label_confidences": [state]}
        for label, state in ((2, PRESENT), (5, ABSENT))
    ]
    dataset = write(tmp_path, "x", photos, labels, hierarchy)
    source = single_source(dataset, dataset.split("train"))
    verified = VerifiedLabels(dataset)
    assert verified.of_image(source, 0).tolist() == [1, 1, 1, 0, 0, 1]
    assert verified.of_image(source, 1).tolist() == [0, -1, -1, 0, 0, -1]


def test_a_class_of_several_source_classes_is_absent_only_if_all_of_them_are(tmp_path):
    """A photo without babies may show a person."""
    run = write(tmp_path, "run", [NO_BOXES], ["person", "car"], None)
    labels = ["baby", "adult", "car"]
    absent = ([0], [0, 1], [0, 2], [])
    photos = [
        NO_BOXES | {"label_classes": classes, "label_confidences": [ABSENT] * len(classes)}
        for classes in absent
    ]
    photos.append(NO_BOXES | {"label_classes": [0, 1], "label_confidences": [ABSENT, PRESENT]})
    other = write(tmp_path, "other", photos, labels, None)
    path = tmp_path / "map.csv"
    path.write_text("theirs,ours\nbaby,person\nadult,person\ncar,car\n")
    (source,) = open_sources(
        run,
        data_settings(
            sources=(SourceSettings(str(other.directory), class_map=f"{path}:theirs:ours"),)
        ),
    )
    verified = VerifiedLabels(run)
    assert [verified.of_image(source, i).tolist() for i in range(5)] == [
        [0, 0],
        [-1, 0],
        [0, -1],
        [0, 0],
        [1, 0],
    ]
