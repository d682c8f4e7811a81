"""What a training batch says of its photos: objects, ignore regions, verified labels, sources."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from common.data import input as inputs
from common.data.dataset import CROWD, GROUP_OF, Dataset, DatasetWriter
from common.data.dataset_format import ABSENT, NOT_EXHAUSTIVE, PRESENT
from common.data.labels import VerifiedLabels
from common.data.plans.plan import train_plan
from common.data.settings import SourceSettings
from common.data.sources import open_sources, single_source
from common.io.errors import UserError
from tests.common.data.factories import data_settings

SIZE = 64
# One level below: Animal > Dog > Puppy, Animal > Cat; Tree.
LABELS = ["Animal", "Dog", "Puppy", "Cat", "Tree"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {
            "LabelName": "Animal",
            "Subcategory": [
                {"LabelName": "Dog", "Subcategory": [{"LabelName": "Puppy"}]},
                {"LabelName": "Cat"},
            ],
        },
        {"LabelName": "Tree"},
    ],
}


def write(folder, name, photos, labels=LABELS, hierarchy=HIERARCHY, size=SIZE) -> Dataset:
    """`photos`: for each keyword arguments of `DatasetWriter.add_image` after the size."""
    folder.mkdir(exist_ok=True)
    extra = {"has_ignore": True} if any("ignore" in photo for photo in photos) else {}
    with DatasetWriter(
        folder / name, name, labels, labels, hierarchy, str(folder), **extra
    ) as writer:
        for i, photo in enumerate(photos):
            pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            writer.add_image(f"{name}{i}", f"{name}{i}.png", (size, size), **photo)
        writer.add_split("train", range(len(photos)))
    return Dataset.open(folder / name)


def read(dataset, num_steps=1, start_step=0, **changes):
    settings = data_settings(**{"flip": False, "scale_jitter": (1.0, 1.0)} | changes)
    plan = train_plan(dataset, settings, 3)
    return list(
        inputs.train_batches(
            dataset, plan, settings, seed=5, num_steps=num_steps, start_step=start_step
        )
    )


def boxes_of(batch, slot, kind):
    valid = batch[f"{kind}_valid"][slot]
    return sorted(tuple(box) for box in (batch[f"{kind}_boxes"][slot][valid] / SIZE).tolist())


NO_BOXES = {"boxes": np.zeros((0, 4)), "classes": []}
BOXES = np.array([[0, 0, 0.25, 0.25], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 0.75, 1]])


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


# -------------------------------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> tuple[Dataset, Dataset]:
    """The run's set, and one of other classes: 'hound' is a Dog, 'car' is nothing of the run."""
    folder = tmp_path_factory.mktemp("sources")
    photo = {"boxes": BOXES[:2], "classes": [1, 3]}
    run = write(folder, "run", [photo] * 7)
    other = write(
        folder,
        "other",
        [{"boxes": BOXES[:2], "classes": [0, 1], "label_classes": [0], "label_confidences": [1]}]
        * 5,
        ["hound", "car"],
        None,
    )
    (folder / "map.csv").write_text("mine,theirs\nDog,hound\nLorry,car\n")
    return run, other


def sources_of(datasets, **changes):
    run, other = datasets
    fields = {"class_map": f"{run.directory.parent / 'map.csv'}:theirs:mine", "others": "unknown"}
    return (
        SourceSettings(str(run.directory), share=3.0),
        SourceSettings(str(other.directory), **fields | changes),
    )


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
def test_sources_have_their_shares_and_say_what_they_know(datasets, sampler):
    run, _ = datasets
    batches = read(run, num_steps=10, sources=sources_of(datasets), sampler=sampler, batch_size=8)
    for batch in batches:
        assert (batch["source"] == 1).sum() == 2  # a quarter
        for slot, source in enumerate(batch["source"]):
            index, valid = batch["image_index"][slot], batch["gt_valid"][slot]
            if source == 0:
                assert index < 7 and batch["class_known"][slot].all()
                assert sorted(batch["gt_classes"][slot][valid]) == [1, 3]
                assert not batch["ignore_valid"][slot].any()
            else:
                assert 7 <= index < 12
                assert batch["class_known"][slot].tolist() == [False, True, False, False, False]
                assert batch["gt_classes"][slot][valid].tolist() == [1]
                assert boxes_of(batch, slot, "ignore") == [tuple(BOXES[1])]  # the car
    seen = np.concatenate([batch["image_index"] for batch in batches])
    assert set(seen) == set(range(12))


def test_a_source_gives_some_of_its_photos_that_show_classes_of_the_run(tmp_path, datasets):
    run, _ = datasets
    car, hound = ({"boxes": BOXES[:1], "classes": [c]} for c in (1, 0))
    other = write(tmp_path, "many", [car, hound, hound, car, NO_BOXES] * 3, ["hound", "car"], None)
    for most, expected in ((2, [1, 7]), (4, [1, 2, 7, 11]), (9, [1, 2, 6, 7, 11, 12])):
        _, source = open_sources(
            run, data_settings(sources=sources_of((run, other), max_images=most))
        )
        assert source.images.tolist() == expected
    empty = write(tmp_path, "empty", [car], ["hound", "car"], None)
    with pytest.raises(UserError, match="none of the 1 photos .* has a box of a class of the run"):
        open_sources(run, data_settings(sources=sources_of((run, empty), max_images=2)))
    with pytest.raises(UserError, match="max_images: found 2, expected 0: annotations 'labels'"):
        SourceSettings(annotations="labels", max_images=2)


def test_every_source_goes_through_all_its_images(datasets):
    run, _ = datasets
    settings = data_settings(sources=sources_of(datasets), batch_size=4)
    plan = train_plan(run, settings, 3)
    assert plan.steps_per_epoch == 3  # 12 images
    drawn = [plan.batch(step) for step in range(35)]
    images, sources = (np.concatenate([d[i] for d in drawn]) for i in (0, 2))
    for place, count in ((0, 7), (1, 5)):
        stream = images[sources == place]
        for start in range(0, len(stream) // count * count, count):
            assert len(set(stream[start : start + count])) >= count - 3  # slots are shuffled
        assert np.ptp(np.bincount(stream)) <= 1
    assert plan.image_name(0).endswith("run: run0") and plan.image_name(11).endswith("other4")


def test_a_source_of_image_labels_has_no_background(datasets):
    run, _ = datasets
    sources = sources_of(datasets, annotations="labels")
    batches = read(
        run, num_steps=4, sources=sources, batch_size=8, image_labels=True, sampler="class_aware"
    )
    for batch in batches:
        other = batch["source"] == 1
        assert not batch["gt_valid"][other].any()
        np.testing.assert_array_equal(batch["drawn_class"][other], 1)
        for slot in np.flatnonzero(other):
            assert boxes_of(batch, slot, "ignore") == [(0, 0, 1, 1)]
            assert batch["labels"][slot].tolist() == [1, 1, 0, 0, 0]


def test_sources_resume_exactly_and_hosts_share_their_batches(datasets):
    run, _ = datasets
    settings = data_settings(sources=sources_of(datasets), batch_size=8, sampler="class_aware")
    plan = train_plan(run, settings, 3)

    def batches(start, count, **hosts):
        return list(
            inputs.train_batches(
                run, plan, settings, seed=1, start_step=start, num_steps=count, **hosts
            )
        )

    whole = batches(0, 6)
    halves = [batches(4, 2, process_index=p, process_count=2) for p in range(2)]
    for step, parts in enumerate(zip(*halves, strict=True), start=4):
        for name, value in whole[step].items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, value, err_msg=name)


def test_one_source_of_the_run_is_the_run_without_sources(datasets):
    run, _ = datasets
    plain = read(run, num_steps=5)
    listed = read(run, num_steps=5, sources=(SourceSettings(str(run.directory)),))
    for batch, expected in zip(listed, plain, strict=True):
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_map": ""}, r"sources\[1\]: no class of the source becomes one of the run"),
        ({"class_map": "map.csv"}, "class map 'map.csv': expected FILE:SOURCE_COLUMN"),
        ({"split": "test"}, "no split 'test'"),
        ({"dir": "nowhere"}, "nowhere is no dataset directory"),
    ],
)
def test_wrong_sources_are_refused_in_one_line(datasets, changes, message):
    first, second = sources_of(datasets)
    second = SourceSettings(**(vars(second) | changes))
    with pytest.raises(UserError, match=message) as error:
        read(datasets[0], sources=(first, second))
    assert "\n" not in str(error.value)


def test_empty_sources_and_shares_that_are_not_positive_are_refused(datasets, tmp_path):
    for share in (0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"share: found {share}, expected a positive number"):
            SourceSettings("x", share=share)
    empty = write(tmp_path, "empty", [])
    with pytest.raises(UserError, match="split 'train' has no images, expected some"):
        read(datasets[0], sources=(SourceSettings(str(empty.directory)),))
    with pytest.raises(UserError, match="'full_class_batch' with 2 sources"):
        read(datasets[0], sources=sources_of(datasets), sampler="full_class_batch")
