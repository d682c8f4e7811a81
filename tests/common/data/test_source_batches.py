"""Training batches of several sources: shares, what each knows, what is refused."""

import numpy as np
import pytest

from common.data import input as inputs
from common.data.dataset import Dataset
from common.data.plans.plan import train_plan
from common.data.settings import SourceSettings
from common.data.sources import open_sources
from common.io.errors import UserError
from tests.common.data.factories import data_settings
from tests.common.data.small_sets import BOXES, NO_BOXES, boxes_of, read, write


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
