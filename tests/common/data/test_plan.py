"""Plans: what a sampler promises about classes, images, epochs and resuming."""

import itertools
import typing

import numpy as np
import pytest

from common.data.dataset import CROWD, GROUP_OF, Dataset, DatasetWriter
from common.data.plans.class_index import images_by_class
from common.data.plans.permutation import permute, stream_key
from common.data.plans.plan import class_histogram, train_plan
from common.data.settings import Sampler
from common.data.sources import single_source
from common.io.errors import UserError
from tests.common.data.factories import data_settings

SAMPLERS = typing.get_args(Sampler)
LABELS = ["a", "b", "unused", "d", "e", "f", "g", "h"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """60 images; class 2 has none, class 7 only a group-of box, some images have no boxes."""
    directory = tmp_path_factory.mktemp("plan") / "set"
    rng = np.random.default_rng(0)
    with DatasetWriter(directory, "set", LABELS, LABELS, None) as writer:
        for i in range(60):
            classes = rng.choice([0, 0, 0, 1, 3, 4, 5, 6], rng.integers(0, 5)).tolist()
            flags = [0] * len(classes)
            if i == 17:
                classes, flags = [*classes, 7], [*flags, GROUP_OF]
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(classes), 1))
            writer.add_image(f"{i:03d}", f"{i}.jpg", (4, 4), boxes, classes, flags)
        writer.add_split("train", rng.permutation(60)[:47])
        writer.add_split("all", range(60))
        writer.add_split("empty", [])
    return Dataset.open(directory)


def make_plan(dataset, split, sampler, seed, batch_size, **changes):
    settings = data_settings(train_split=split, sampler=sampler, batch_size=batch_size, **changes)
    return train_plan(dataset, settings, seed)


def draws(plan, num_steps):
    """All (image, class) pairs of the first steps, in order."""
    batches = [plan.batch(step) for step in range(num_steps)]
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 12345])
def test_permute_is_a_permutation_of_any_size(size):
    key = stream_key(3, size)
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_gives_every_order_equally_often():
    keys = stream_key(11, np.arange(24_000))
    orders = np.stack([permute(np.full(24_000, i), 4, keys) for i in range(4)], axis=1)
    counts = [np.all(orders == order, axis=1).sum() for order in itertools.permutations(range(4))]
    chi_square = np.sum((np.array(counts) - 1000) ** 2 / 1000)
    assert chi_square < 49.7  # 99.9 % point of 23 degrees of freedom


def test_uniform_visits_every_image_once_an_epoch_in_a_new_order(dataset):
    plan = make_plan(dataset, "train", "uniform", 5, 8)
    assert plan.steps_per_epoch == 6  # 47 images
    images, drawn = draws(plan, 47)
    epochs = images.reshape(8, 47)
    for epoch in epochs:
        assert sorted(epoch) == sorted(dataset.split("train"))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert (drawn == -1).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_step_can_be_asked_for_alone(dataset, sampler):
    plan, again = (make_plan(dataset, "all", sampler, 9, 20) for _ in range(2))
    expected = [plan.batch(step) for step in range(40)]
    for step in (39, 0, 17, 17):
        np.testing.assert_array_equal(again.batch(step), expected[step])
    other_seed = make_plan(dataset, "all", sampler, 10, 20)
    assert not np.array_equal(other_seed.batch(3)[0], expected[3][0])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_class_aware_rounds_hold_each_class_once(dataset, batch_size):
    plan = make_plan(dataset, "all", "class_aware", 0, batch_size)
    images, drawn = draws(plan, 70)
    for image, label in zip(images, drawn, strict=True):
        assert label in dataset.image_boxes(image)[1]
    rounds = drawn[: len(drawn) // 7 * 7].reshape(-1, 7)
    assert (np.sort(rounds, axis=1) == [0, 1, 3, 4, 5, 6, 7]).all()
    assert len({tuple(order) for order in rounds[:10]}) > 5


@pytest.mark.parametrize("sampler", ["class_aware", "full_class_batch"])
@pytest.mark.parametrize("batch_size", [3, 7, 9, 14, 24])
def test_a_class_goes_through_all_its_images_before_any_comes_again(dataset, sampler, batch_size):
    plan = make_plan(dataset, "all", sampler, 4, batch_size)
    images, drawn = draws(plan, 120)
    for label in np.unique(drawn):
        mine = [i for i in range(60) if label in dataset.image_boxes(i)[1]]
        counts = np.bincount(images[drawn == label], minlength=60)
        # Equal up to one at the end of every step: no image is ever two draws ahead.
        assert counts[mine].max() - counts[mine].min() <= 1
        assert counts.sum() == counts[mine].sum()


def test_class_aware_draw_r_takes_element_r_of_the_class_stream(dataset):
    plan = make_plan(dataset, "all", "class_aware", 4, 5)
    images, drawn = draws(plan, 200)
    for label in (0, 1):
        mine = sorted(i for i in range(60) if label in dataset.image_boxes(i)[1])
        stream = images[drawn == label]
        passes = stream[: len(stream) // len(mine) * len(mine)].reshape(-1, len(mine))
        assert len(passes) > 2
        assert (np.sort(passes, axis=1) == mine).all()
        assert len({tuple(order) for order in passes}) == len(passes)


@pytest.mark.parametrize("batch_size", [7, 8, 13, 14, 15, 30])
def test_full_class_batch_holds_every_class_in_every_batch(dataset, batch_size):
    plan = make_plan(dataset, "all", "full_class_batch", 1, batch_size)
    totals = np.zeros(8, int)
    for step in range(50):
        images, drawn, _ = plan.batch(step)
        counts = np.bincount(drawn, minlength=8)
        present = counts[[0, 1, 3, 4, 5, 6, 7]]
        assert counts[2] == 0
        assert present.min() >= batch_size // 7
        assert len(images) == batch_size
        totals += counts
    # The remaining slots go round the classes across steps.
    assert np.ptp(totals[[0, 1, 3, 4, 5, 6, 7]]) <= 1


def test_full_class_batch_smaller_than_the_classes_cycles_through_them(dataset):
    plan = make_plan(dataset, "all", "full_class_batch", 1, 3)
    _, drawn = draws(plan, 70)
    assert (np.sort(drawn.reshape(-1, 7), axis=1) == [0, 1, 3, 4, 5, 6, 7]).all()


def test_full_class_batch_mixes_the_classes_over_the_devices(dataset):
    plan = make_plan(dataset, "all", "full_class_batch", 1, 14)
    first_slots = {int(plan.batch(step)[1][0]) for step in range(60)}
    assert first_slots == {0, 1, 3, 4, 5, 6, 7}


def test_ignored_boxes_do_not_count_as_containing_a_class(dataset):
    plan = make_plan(dataset, "all", "class_aware", 0, 8, group_of="drop")
    assert 7 not in draws(plan, 30)[1]


@pytest.mark.parametrize("group_of", ["ordinary", "ignore", "drop"])
def test_no_image_is_drawn_for_the_crowds_of_a_class(tmp_path, group_of):
    with DatasetWriter(tmp_path / "x", "x", ["a", "b"], ["a", "b"], None) as writer:
        for i, flags in enumerate([0, GROUP_OF, CROWD | GROUP_OF]):
            writer.add_image(f"{i}", f"{i}.jpg", (4, 4), [[0, 0, 1, 1]] * 2, [0, 1], [flags, 0])
        writer.add_split("train", range(3))
    plan = make_plan(Dataset.open(tmp_path / "x"), "train", "class_aware", 0, 4, group_of=group_of)
    images, drawn = draws(plan, 9)
    assert set(images[drawn == 0]) == ({0, 1} if group_of == "ordinary" else {0})
    assert set(images[drawn == 1]) == {0, 1, 2}


def test_class_histogram_counts_draws_images_and_boxes(dataset):
    plan = make_plan(dataset, "all", "class_aware", 2, 6)
    found = class_histogram(plan, range(10, 20))
    drawn, images, boxes, absent = (np.zeros(8, int) for _ in range(4))
    for step in range(10, 20):
        absent += ~np.isin(np.arange(8), plan.batch(step).classes)
        for image, label in zip(*plan.batch(step)[:2], strict=True):
            drawn[label] += 1
            classes = dataset.image_boxes(image)[1]
            np.add.at(boxes, classes, 1)
            images[np.unique(classes)] += 1
    np.testing.assert_array_equal(found, [drawn, images, boxes, absent])
    uniform = make_plan(dataset, "all", "uniform", 2, 6)
    assert class_histogram(uniform, range(3)).drawn.sum() == 0


def test_images_by_class_does_not_depend_on_the_chunk_size(dataset):
    source = single_source(dataset, dataset.split("train"))
    classes, images = images_by_class(source)
    again, parts = images_by_class(source, chunk=7)
    np.testing.assert_array_equal(again, classes)
    for part, expected in zip(parts, images, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_splits_without_images_are_refused_in_one_line(dataset):
    with pytest.raises(UserError, match="split 'empty' has no images"):
        make_plan(dataset, "empty", "uniform", 0, 8)
    with pytest.raises(UserError, match="no split 'test'"):
        make_plan(dataset, "test", "uniform", 0, 8)


def test_class_sampler_without_any_box_is_refused(tmp_path):
    with DatasetWriter(tmp_path / "bare", "bare", LABELS, LABELS, None) as writer:
        writer.add_split("train", [writer.add_image("a", "a.jpg")])
    with pytest.raises(UserError, match="have no boxes"):
        make_plan(Dataset.open(tmp_path / "bare"), "train", "class_aware", 0, 8)


def test_images_with_boxes_are_counted(dataset):
    images = dataset.split("train")
    boxed = sum(len(dataset.image_boxes(i)[0]) > 0 for i in images.tolist())
    assert make_plan(dataset, "train", "uniform", 0, 4).boxed_images == boxed > 0


def test_expert_mixes_drawn_classes_with_images_without_boxes(dataset):
    """One slot in four holds an image by class, the others each background image equally often."""
    plan = make_plan(dataset, "all", "expert", 1, 10)
    by_class = make_plan(dataset, "all", "class_aware", 1, 10)
    empty = np.flatnonzero(np.diff(dataset.box_offsets) == 0)
    steps = 4 * len(empty)
    images, drawn = draws(plan, steps)
    positive = drawn >= 0
    per_batch = positive.reshape(steps, 10).sum(axis=1)
    assert set(per_batch) == {2, 3} and positive.sum() == steps * 10 // 4
    for image, label in zip(images[positive], drawn[positive], strict=True):
        assert label in dataset.image_boxes(image)[1]
    background = np.bincount(images[~positive], minlength=60)
    assert background[empty].max() - background[empty].min() <= 1
    assert background.sum() == background[empty].sum()
    # The draws are those of class-aware sampling, in another order within a batch.
    expected = [part[: positive.sum()] for part in draws(by_class, steps)]
    assert sorted(zip(images[positive], drawn[positive], strict=True)) == sorted(
        zip(*expected, strict=True)
    )
    # No place of the batch, hence no device, gets one kind only.
    assert (positive.reshape(steps, 10).any(axis=0)).all()
    assert not (positive.reshape(steps, 10).all(axis=0)).any()


def test_expert_share_is_exact_over_any_run_of_slots(dataset):
    for share in (1 / 3, 0.9):
        plan = make_plan(dataset, "all", "expert", 1, 7, positive_share=share)
        positive = (draws(plan, 20)[1] >= 0).reshape(20, 7).sum(axis=1).cumsum()
        np.testing.assert_allclose(positive, share * 7 * np.arange(1, 21), atol=1.0)


def test_expert_needs_both_kinds_of_images(tmp_path):
    with DatasetWriter(tmp_path / "full", "full", ["a"], ["a"], None) as writer:
        writer.add_image("x", "x.jpg", (4, 4), [[0, 0, 1, 1]], [0])
        writer.add_split("train", [0])
    with pytest.raises(UserError, match="training images all have boxes"):
        make_plan(Dataset.open(tmp_path / "full"), "train", "expert", 0, 8)


def expected_factors(dataset, images, threshold):
    """LVIS' repeat factors, image by image."""
    classes = [set(dataset.image_boxes(i)[1].tolist()) for i in images]
    annotated = sum(bool(present) for present in classes)
    share = {c: sum(c in present for present in classes) / annotated for c in range(8)}
    return np.array(
        [max([1.0, *(np.sqrt(threshold / share[c]) for c in present)]) for present in classes]
    )


def test_repeat_factors_draw_each_image_by_its_rarest_class(dataset):
    images, threshold, epochs = dataset.split("train"), 0.3, 400
    plan = make_plan(dataset, "train", "repeat_factor", 3, 8, repeat_threshold=threshold)
    factors = expected_factors(dataset, images, threshold)
    assert factors.max() > 2 and (factors == 1).any() and len(set(factors)) > 3
    (stream, _) = plan.streams
    lengths = [int(stream.draws(epoch).sum()) for epoch in range(epochs)]
    assert len(set(lengths)) > 5
    start, totals, patterns = 0, np.zeros(60), set()
    for length in lengths[:50]:
        drawn = np.bincount(stream.draw(np.arange(start, start + length)).images, minlength=60)
        start += length
        # Rounded up or down, every image at least once: an epoch is complete.
        assert (drawn[images] >= np.floor(factors)).all()
        assert (drawn[images] <= np.ceil(factors)).all()
        patterns.add(drawn.tobytes())
    assert len(patterns) > 20
    for epoch in range(epochs):
        totals[images] += stream.draws(epoch)
    error = (totals[images] / epochs - factors) / np.sqrt(0.25 / epochs)
    assert np.abs(error).max() < 4  # standard deviations
    _, drawn = draws(plan, 5)
    assert (drawn == -1).all()


def test_repeat_factor_batches_are_the_stream_wherever_one_starts(dataset):
    plan, again = (
        make_plan(dataset, "train", "repeat_factor", 3, 7, repeat_threshold=0.3) for _ in range(2)
    )
    stream = plan.streams[0].draw(np.arange(7 * 60)).images
    np.testing.assert_array_equal(draws(plan, 60)[0], stream)
    for step in (59, 0, 31):  # 60 steps are several epochs
        np.testing.assert_array_equal(again.batch(step).images, stream[7 * step : 7 * step + 7])
    uniform = make_plan(dataset, "train", "repeat_factor", 3, 7, repeat_threshold=0.0)
    for epoch in draws(uniform, 47)[0].reshape(7, 47):
        assert sorted(epoch) == sorted(dataset.split("train"))


def test_repeat_factor_needs_boxes(tmp_path):
    with DatasetWriter(tmp_path / "bare", "bare", LABELS, LABELS, None) as writer:
        writer.add_split("train", [writer.add_image("a", "a.jpg")])
    with pytest.raises(UserError, match="have no boxes, sampler 'repeat_factor'"):
        make_plan(Dataset.open(tmp_path / "bare"), "train", "repeat_factor", 0, 8)
