"""Batches: exact resume, any number of hosts, exactly-once evaluation, bad photos."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import input as inputs
from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from common.data.settings import DataSettings, SourceSettings
from common.io.errors import UserError
from tests.common.data.factories import data_settings

NUM_IMAGES = 21
CROWDED = 4  # the image with 2,000 boxes


def config(**changes) -> DataSettings:
    return data_settings(**{"canvas": (64, 64), "sampler": "class_aware"} | changes)


def plan_of(dataset, split, sampler, seed, batch_size, **changes):
    settings = config(train_split=split, sampler=sampler, batch_size=batch_size, **changes)
    return train_plan(dataset, settings, seed)


def write_dataset(directory, broken=()) -> Dataset:
    """Photos of many shapes in one colour each; class of a box = image index % 3."""
    rng = np.random.default_rng(0)
    (directory / "photos").mkdir(parents=True)
    labels = ["a", "b", "c"]
    with DatasetWriter(
        directory / "set", "set", labels, labels, None, str(directory / "photos")
    ) as writer:
        for i in range(NUM_IMAGES):
            height, width = rng.integers(20, 120, 2)
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            path = directory / "photos" / f"{i}.jpg"
            Image.fromarray(pixels).save(path)
            if i in broken:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            count = 2000 if i == CROWDED else i % 4
            corners = np.sort(rng.random((2, count, 2)), axis=0)
            boxes = np.concatenate([corners[0], corners[1]], axis=1)
            flags = np.where(np.arange(count) == 0, GROUP_OF, 0)
            classes = np.full(count, i % 3)
            if i == CROWDED:
                classes[:-1] = 2  # one box only of its own class
            writer.add_image(f"{i}", f"{i}.jpg", (height, width), boxes, classes, flags)
        writer.add_split("train", range(NUM_IMAGES))
        writer.add_split("few", [7, 3])
    return Dataset.open(directory / "set")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("input"))


def train(dataset, sampler="class_aware", batch_size=6, data_config=None, **options):
    settings = dataclasses.replace(
        data_config or config(), train_split="train", sampler=sampler, batch_size=batch_size
    )
    options = {"seed": 5, "num_steps": 5} | options
    plan = train_plan(dataset, settings, 3)
    return list(inputs.train_batches(dataset, plan, settings, **options))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_batch_fields_have_the_documented_shapes_and_types(dataset):
    (batch,) = train(dataset, num_steps=1)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((6, 64, 64, 3), "uint8"),
        "image_size": ((6, 2), "float32"),
        "original_size": ((6, 2), "int32"),
        "gt_boxes": ((6, 10, 4), "float32"),
        "gt_classes": ((6, 10), "int32"),
        "gt_group_of": ((6, 10), "bool"),
        "gt_valid": ((6, 10), "bool"),
        "ignore_boxes": ((6, 8, 4), "float32"),
        "ignore_valid": ((6, 8), "bool"),
        "image_index": ((6,), "int32"),
        "image_valid": ((6,), "bool"),
        "drawn_class": ((6,), "int32"),
    }


@pytest.mark.parametrize("sampler", ["uniform", "class_aware", "full_class_batch"])
@pytest.mark.parametrize("changes", [{}, {"canvas": (32, 64), "scales": (24, 32)}])
def test_resume_at_any_step_gives_the_same_bytes(dataset, sampler, changes):
    settings = config(**changes)
    whole = train(dataset, sampler, data_config=settings, num_steps=8)
    assert len({batch["image"].shape for batch in whole}) == (2 if changes else 1)
    for step in (1, 5, 8):
        options = {"start_step": step, "num_steps": 8 - step}
        assert_equal(train(dataset, sampler, data_config=settings, **options), whole[step:])


def test_thread_and_prefetch_counts_do_not_change_the_batches(dataset):
    other = config(num_threads=1, prefetch=1)
    assert_equal(train(dataset, data_config=other), train(dataset))


def test_seeds_change_the_augmentation(dataset):
    first, second = train(dataset), train(dataset, seed=6)
    np.testing.assert_array_equal(first[0]["image_index"], second[0]["image_index"])
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_slices_of_the_hosts_are_the_batch_of_one_host(dataset, hosts):
    options = {"batch_size": 24, "num_steps": 2, "data_config": config(canvas=(32, 64))}
    single = train(dataset, **options)
    slices = [train(dataset, **options, process_index=p, process_count=hosts) for p in range(hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*slices, strict=True)
    ]
    assert_equal(joined, single)


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
@pytest.mark.parametrize("split", ["train", "few"])
def test_evaluation_covers_every_image_once_on_any_number_of_hosts(dataset, hosts, split):
    batches = [
        inputs.eval_batches(
            dataset,
            split,
            config(canvas=(32, 64)),
            batch_size=2 * hosts if hosts < 8 else 8,
            process_index=p,
            process_count=hosts,
        )
        for p in range(hosts)
    ]
    assert len({iterator.num_batches for iterator in batches}) == 1
    collected = [list(iterator) for iterator in batches]
    assert {len(part) for part in collected} == {batches[0].num_batches}
    seen = []
    for batch in (batch for part in collected for batch in part):
        np.testing.assert_array_equal(batch["image_valid"], batch["image_index"] >= 0)
        padding = ~batch["image_valid"]
        assert not batch["image"][padding].any()
        assert not {name for name in batch if name.startswith("gt_")}
        seen += batch["image_index"][batch["image_valid"]].tolist()
    assert sorted(seen) == sorted(dataset.split(split).tolist())


@pytest.mark.parametrize("canvas", [(64, 64), (48, 64)])
def test_evaluation_does_not_augment(dataset, canvas):
    for batch in inputs.eval_batches(dataset, "train", config(canvas=canvas), batch_size=7):
        for slot in np.flatnonzero(batch["image_valid"]):
            size, original = batch["image_size"][slot], batch["original_size"][slot]
            ratio = min(canvas[0] / original.min(), canvas[1] / original.max())
            np.testing.assert_allclose(size, np.maximum(1, original * ratio), atol=0.5001)
        sizes = dataset.image_sizes[batch["image_index"][batch["image_valid"]]]
        np.testing.assert_array_equal(batch["original_size"][batch["image_valid"]], sizes)


def test_boxes_of_training_lie_on_the_canvas_as_their_photo_does(dataset):
    plan = plan_of(dataset, "few", "uniform", 0, 2)
    plain = config(scale_jitter=(1.0, 1.0), flip=False)
    batch = next(inputs.train_batches(dataset, plan, plain, seed=0, num_steps=1))
    slot = batch["image_index"].tolist().index(7)
    boxes, classes, _ = dataset.image_boxes(7)
    height, width = batch["image_size"][slot]
    np.testing.assert_allclose(
        batch["gt_boxes"][slot, : len(boxes)], boxes * [width, height, width, height], rtol=1e-5
    )
    assert batch["gt_valid"][slot].sum() == len(boxes)
    np.testing.assert_array_equal(batch["gt_classes"][slot, : len(boxes)], classes)


def test_half_of_the_training_images_are_mirrored(dataset):
    plan = plan_of(dataset, "few", "uniform", 0, 40)
    fixed = config(scale_jitter=(1.0, 1.0))
    plain = next(inputs.eval_batches(dataset, "few", fixed, batch_size=2))
    batch = next(inputs.train_batches(dataset, plan, fixed, seed=1, num_steps=1))
    row = {7: 0, 3: 1}
    same = [
        (image == plain["image"][row[int(index)]]).all()
        for image, index in zip(batch["image"], batch["image_index"], strict=True)
    ]
    assert 8 <= sum(same) <= 32
    never = config(scale_jitter=(1.0, 1.0), flip=False)
    batch = next(inputs.train_batches(dataset, plan, never, seed=1, num_steps=1))
    for image, index in zip(batch["image"], batch["image_index"], strict=True):
        np.testing.assert_array_equal(image, plain["image"][row[int(index)]])


def test_of_too_many_boxes_a_random_part_with_the_drawn_class_is_used(dataset, capfd):
    plan = plan_of(dataset, "train", "class_aware", 3, 24)
    batches = inputs.train_batches(dataset, plan, config(), seed=0, num_steps=8)
    subsets, crowded = set(), 0
    for batch in batches:
        for slot in np.flatnonzero(batch["image_index"] == CROWDED):
            crowded += 1
            assert batch["gt_valid"][slot].all()
            subsets.add(batch["gt_boxes"][slot].tobytes())
            if batch["drawn_class"][slot] == CROWDED % 3:
                assert CROWDED % 3 in batch["gt_classes"][slot]
    assert crowded > 3 and len(subsets) == crowded
    assert batches.dropped_boxes >= crowded * 1000
    printed = capfd.readouterr().err
    assert len(re.findall(r"4\.jpg: \d+ boxes, a random 10 of them", printed)) == 1


def test_group_of_boxes_are_marked_or_dropped(dataset):
    (ordinary,) = train(dataset, "uniform", 21, num_steps=1)
    assert ordinary["gt_group_of"].any()
    assert not (ordinary["gt_group_of"] & ~ordinary["gt_valid"]).any()
    (dropped,) = train(dataset, "uniform", 21, config(group_of="drop"), num_steps=1)
    assert not dropped["gt_group_of"].any()
    few = ordinary["image_index"] != CROWDED
    remaining = ordinary["gt_valid"] & ~ordinary["gt_group_of"]
    np.testing.assert_array_equal(dropped["gt_valid"].sum(1)[few], remaining.sum(1)[few])


def test_fatal_photo_is_named_with_the_reason(tmp_path):
    dataset = write_dataset(tmp_path, broken=(5, 9))
    batches = inputs.eval_batches(dataset, "train", config(), batch_size=2)
    read = []
    with pytest.raises(UserError, match=r"photos/5\.jpg: cannot read the image: .*truncated") as e:
        for batch in batches:
            read += batch["image_index"].tolist()
    assert read == [0, 1, 2, 3]
    assert "\n" not in str(e.value)


def test_portraits_reach_the_short_side_in_training_and_evaluation(tmp_path):
    """On a canvas of 800 x 1333 a portrait of 3:4 is drawn at 800 x 1067, not at 600 x 800."""
    sizes = [(48, 36), (36, 48), (36, 48), (36, 48)]
    with DatasetWriter(tmp_path / "set", "x", ["a"], ["a"], None, str(tmp_path)) as writer:
        for i, (height, width) in enumerate(sizes):
            Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / f"{i}.png")
            writer.add_image(f"{i}", f"{i}.png", (height, width), [[0, 0, 1, 1]], [0])
        writer.add_split("train", range(4))
    dataset = Dataset.open(tmp_path / "set")
    settings = config(canvas=(800, 1333), batch_size=1, sampler="uniform", scale_jitter=(1.0, 1.0))
    plan = train_plan(dataset, settings, 0)
    training = list(inputs.train_batches(dataset, plan, settings, seed=0, num_steps=4))
    evaluation = list(inputs.eval_batches(dataset, "train", settings, batch_size=1))
    for batches in (training, evaluation):
        assert sorted(int(batch["image_index"][0]) for batch in batches) == [0, 1, 2, 3]
        for batch in batches:
            portrait = batch["image_index"][0] == 0
            size = (1067, 800) if portrait else (800, 1067)
            assert tuple(batch["image_size"][0]) == size
            assert batch["image"].shape[1:3] == ((1344, 800) if portrait else (800, 1344))


def test_photos_whose_size_is_wrong_or_unknown_are_fitted_whole(tmp_path):
    with DatasetWriter(tmp_path / "set", "x", ["a"], ["a"], None, str(tmp_path)) as writer:
        for i, size in enumerate([(0, 0), (48, 36)]):  # in truth 60 x 30 and 30 x 60
            Image.new("RGB", ((30, 60), (60, 30))[i], (9, 9, 9)).save(tmp_path / f"{i}.png")
            writer.add_image(f"{i}", f"{i}.png", size)
        writer.add_split("train", range(2))
    dataset = Dataset.open(tmp_path / "set")
    first, second = inputs.eval_batches(dataset, "train", config(canvas=(32, 64)), batch_size=1)
    assert first["image"].shape[1:3] == (32, 64) and tuple(first["image_size"][0]) == (32, 16)
    assert second["image"].shape[1:3] == (64, 32) and tuple(second["image_size"][0]) == (16, 32)


def test_an_error_comes_in_the_place_of_its_batch(tmp_path):
    dataset = write_dataset(tmp_path, broken=(20,))
    batches = inputs.eval_batches(dataset, "train", config(num_threads=8), batch_size=3)
    read = []
    with pytest.raises(UserError, match=r"photos/20\.jpg"):
        for batch in batches:
            read += batch["image_index"].tolist()
    assert read == list(range(18))


def test_skipped_photos_leave_marked_slots_and_are_told_once(tmp_path, capfd):
    dataset = write_dataset(tmp_path, broken=(5,))
    (tmp_path / "photos" / "9.jpg").unlink()
    plan = plan_of(dataset, "train", "uniform", 3, 21)
    batches = inputs.train_batches(
        dataset, plan, config(on_image_error="skip"), seed=0, num_steps=2
    )
    for batch in batches:
        bad = np.isin(batch["image_index"], [5, 9])
        np.testing.assert_array_equal(batch["image_valid"], ~bad)
        assert not batch["image"][bad].any() and not batch["gt_valid"][bad].any()
    assert batches.skipped_images == 4
    printed = capfd.readouterr().err
    assert printed.count("5.jpg: skipped, cannot read the image: image file is truncated") == 1
    assert printed.count("9.jpg: skipped, cannot read the image: No such file") == 1


def test_skipping_does_not_hide_a_wrong_photo_folder(dataset, tmp_path):
    lost = Dataset.open(dataset.directory, image_root=str(tmp_path))
    plan = plan_of(lost, "train", "uniform", 3, 50)
    with pytest.raises(UserError, match="image_root"):
        for _ in inputs.train_batches(
            lost, plan, config(on_image_error="skip"), seed=0, num_steps=5
        ):
            pass


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"scale_jitter": (1.5, 0.5)}, "scale_jitter"),
        ({"scale_jitter": (float("inf"), float("inf"))}, "scale_jitter"),
        ({"canvas": (0, 10)}, "canvas"),
        ({"canvas": (64, 48)}, "canvas"),
        ({"scales": (0,)}, "scales"),
        ({"max_boxes": 0}, "max_boxes"),
        ({"max_ignore": 0}, "max_ignore"),
        ({"sources": (SourceSettings(),), "max_proposals": 3}, "sources"),
    ],
)
def test_wrong_settings_are_refused(changes, field):
    with pytest.raises(UserError, match=f"^{field}: found"):
        config(**changes)


def test_batch_that_the_hosts_cannot_share_is_refused(dataset):
    with pytest.raises(UserError, match="multiple of 4"):
        train(dataset, batch_size=6, process_count=4)


READS_AHEAD_AT_EXIT = """
import sys
from common.data import input as inputs
from common.data.dataset import Dataset
from tests.common.data.test_input import config, plan_of

dataset = Dataset.open(sys.argv[1])
plan = plan_of(dataset, "train", "uniform", 0, 2)
batches = inputs.train_batches(dataset, plan, config(prefetch=50), seed=0, num_steps=10**6)
next(batches)
cycle = [batches]
cycle.append(cycle)  # deleted by the garbage collector only, when the interpreter goes
sys.modules["cycle"] = cycle
"""


def test_a_process_that_still_reads_ahead_ends(dataset):
    result = subprocess.run(
        [sys.executable, "-c", READS_AHEAD_AT_EXIT, str(dataset.directory)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
