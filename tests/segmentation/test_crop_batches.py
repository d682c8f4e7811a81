"""Batches of crops: which instances, exact resume, any number of hosts, few shapes, right masks."""

import collections
import dataclasses

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.tables import DetectionsWriter
from segmentation.crops import batches as inputs
from segmentation.crops.instances import find_instances, median_aspects
from segmentation.crops.plan import make_plan
from tests.segmentation import coded_photos as coded


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return coded.write_dataset(tmp_path_factory.mktemp("crops"))


def train(dataset, data_config=None, num_steps=4, seed=5, **options):
    data_config = data_config or coded.config()
    plan = make_plan(dataset, data_config, seed)
    return list(inputs.train_batches(dataset, plan, data_config, num_steps=num_steps, **options))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def put_together(parts):
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_instances_have_a_mask_and_are_no_groups(dataset):
    found = find_instances(dataset, "some")
    expected = [
        (row, image)
        for image in (7, 2, 4)
        for row in range(dataset.box_offsets[image], dataset.box_offsets[image + 1])
        if dataset.image_masks(image)[row - dataset.box_offsets[image]] is not None
        and not dataset.box_flags[row] & GROUP_OF
    ]
    assert list(zip(found.rows, found.images, strict=True)) == expected
    np.testing.assert_array_equal(found.classes, dataset.box_classes[found.rows])
    aspects = median_aspects(dataset, find_instances(dataset, "train"))
    whole = find_instances(dataset, "train")
    for class_ in range(3):
        of_class = whole.classes == class_
        boxes = dataset.boxes[whole.rows[of_class]]
        sizes = dataset.image_sizes[whole.images[of_class]]
        ratio = (boxes[:, 2] - boxes[:, 0]) * sizes[:, 1]
        ratio = ratio / ((boxes[:, 3] - boxes[:, 1]) * sizes[:, 0])
        assert aspects[class_] == pytest.approx(np.median(np.maximum(ratio, 1 / ratio)))


def test_a_run_trains_on_the_same_random_instances_throughout(dataset):
    """As row 1 of the paper's table 5 samples 400,000 boxes."""

    def drawn(number, seed, steps):
        plan = make_plan(dataset, coded.config(max_instances=number), seed)
        assert plan.num_instances == number
        return {row for step in steps for row in plan.batch(step).rows.tolist()}

    everything = find_instances(dataset, "train").rows.tolist()
    number = len(everything) // 2
    chosen = drawn(number, 5, range(60))
    assert len(chosen) == number and chosen < set(everything)
    assert drawn(number, 5, range(60, 120)) == chosen
    assert drawn(number, 6, range(60)) != chosen
    whole = make_plan(dataset, coded.config(max_instances=len(everything)), 5)
    np.testing.assert_array_equal(
        whole.batch(3).rows, make_plan(dataset, coded.config(), 5).batch(3).rows
    )


def test_splits_without_instances_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="split 'none' has no box with a mask"):
        find_instances(dataset, "none")
    with DatasetWriter(tmp_path / "set", "set", ["a"], ["a"], None) as writer:
        writer.add_image("a", "a.jpg", (9, 9), [[0, 0, 1, 1]], [0])
        writer.add_split("train", [0])
    with pytest.raises(UserError, match="the dataset has no masks"):
        find_instances(Dataset.open(tmp_path / "set"), "train")


def test_batches_have_the_documented_fields_on_a_canvas_of_the_config(dataset):
    data_config = coded.config()
    plan = make_plan(dataset, data_config, 5)
    for step, batch in enumerate(train(dataset)):
        height, width = plan.canvas(step)
        assert (height, width) in data_config.canvases
        assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
            "image": ((4, height, width, 3), "uint8"),
            "image_size": ((4, 2), "float32"),
            "image_valid": ((4,), "bool"),
            "mask": ((4, height, width), "uint8"),
            "mask_valid": ((4, height, width), "bool"),
            "classes": ((4,), "int32"),
            "instance_index": ((4,), "int64"),
        }
        assert batch["image_valid"].all()
        rows = batch["instance_index"]
        np.testing.assert_array_equal(batch["classes"], dataset.box_classes[rows])


def check_masks(dataset, batch, tolerance):
    """The mask is the ellipse of the box, at the places that the colours tell."""
    for slot in np.flatnonzero(batch["instance_index"] >= 0):
        row = batch["instance_index"][slot]
        height, width = batch["image_size"][slot].astype(int)
        image, known = batch["image"][slot], batch["mask_valid"][slot]
        assert not known[height:].any() and not known[:, width:].any()
        assert not image[height:].any() and not batch["mask"][slot][height:].any()
        assert known[:height, :width].mean() > 0.7
        x, y = image[..., 0] / 255, image[..., 1] / 255
        expected = coded.in_ellipse(dataset.boxes[row], x, y)
        wrong = (expected != (batch["mask"][slot] == 1)) & known
        assert wrong.sum() / known.sum() < tolerance, row


def test_masks_follow_the_pixels_through_jitter_rotation_and_flip(dataset):
    for batch in train(dataset, num_steps=8):
        check_masks(dataset, batch, 0.06)


def test_resume_at_any_step_gives_the_same_bytes(dataset):
    whole = train(dataset, num_steps=7)
    for start in (1, 3, 5):
        assert_equal(train(dataset, num_steps=7 - start, start_step=start), whole[start:])
    assert any(
        (a["image"].shape != b["image"].shape) or (a["image"] != b["image"]).any()
        for a, b in zip(whole, train(dataset, num_steps=7, seed=6), strict=True)
    )


def test_slices_of_the_hosts_are_the_batch_of_one_host(dataset):
    parts = [train(dataset, process_index=i, process_count=4) for i in range(4)]
    assert_equal(put_together(parts), train(dataset))
    data_config = coded.config(canvases=((40, 40), (72, 40), (40, 72)))
    options = dict(batch_size=6, process_count=3)
    parts = [
        list(inputs.eval_batches(dataset, "train", data_config, process_index=i, **options))
        for i in range(3)
    ]
    single = list(inputs.eval_batches(dataset, "train", data_config, batch_size=6))
    assert_equal(put_together(parts), single)


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
def test_a_plan_draws_instances_evenly_and_sorts_them_onto_canvases(dataset, sampler):
    data_config = coded.config(sampler=sampler, batch_size=5, group_steps=4)
    plan = make_plan(dataset, data_config, 0)
    instances = find_instances(dataset, "train")
    assert plan.num_instances == len(instances) == 23
    steps = 23 * 4  # 20 epochs, whole groups
    crops = [plan.batch(step) for step in range(steps)]
    if sampler == "uniform":
        counts = collections.Counter(np.concatenate([c.rows for c in crops]).tolist())
        assert counts == dict.fromkeys(instances.rows.tolist(), 20)
    else:
        counts = np.bincount(np.concatenate([c.classes for c in crops]))
        assert counts.max() - counts.min() <= 1
        drawn = np.concatenate([c.rows for c in crops])
        for class_ in range(3):
            of_class = np.bincount(drawn)[instances.rows[instances.classes == class_]]
            assert of_class.max() - of_class.min() <= 1
    canvases = collections.Counter(c.canvas for c in crops)
    assert len(canvases) == 3  # sorted by aspect: each of the three formats gets batches
    for crop in crops:
        sizes = dataset.image_sizes[crop.images]
        windows = plan.augmentation.windows(
            crop.boxes, sizes, crop.jittered, crop.deviations, crop.draws
        )
        height, width = windows.content.max(axis=0)
        holding = [c for c in data_config.canvases if c[0] >= height and c[1] >= width]
        assert not holding or crop.canvas == min(holding, key=np.prod)


def test_every_instance_is_evaluated_once_as_annotated(dataset):
    batches = inputs.eval_batches(dataset, "train", coded.config(), batch_size=4)
    found = list(batches)
    assert len(found) == batches.num_batches
    rows = np.concatenate([b["instance_index"] for b in found])
    assert sorted(rows[rows >= 0]) == sorted(find_instances(dataset, "train").rows)
    for batch in found:
        np.testing.assert_array_equal(batch["image_valid"], batch["instance_index"] >= 0)
        check_masks(dataset, batch, 0.06)
        for slot in np.flatnonzero(batch["image_valid"]):
            height, width = batch["image_size"][slot].astype(int)
            assert min(height, width) == 30 or max(height, width) == 72
            box = dataset.boxes[batch["instance_index"][slot]]
            # The middles of the first and the last pixels are half a pixel inside the box.
            image = batch["image"][slot, :height, :width] / 255
            shown = np.array([image[0, 0, :2], image[-1, -1, :2]]).ravel()
            inset = (box[2:] - box[:2]) / (2 * np.array([width, height]))
            np.testing.assert_allclose(shown, box + [*inset, *-inset], atol=0.015)


def write_table(path, dataset, moved=0.0, width=1.0):
    """A table of the boxes of all photos, moved to the right by a share of their width, and of
    another width."""
    with DetectionsWriter(path, {"model": "m"}) as writer:
        for i in range(dataset.num_images):
            boxes, classes, _ = dataset.image_boxes(i)
            boxes = boxes.copy()
            boxes[:, [0, 2]] += moved * (boxes[:, 2:3] - boxes[:, :1])
            boxes[:, 2] = boxes[:, 0] + width * (boxes[:, 2] - boxes[:, 0])
            labels = [coded.LABELS[c] for c in classes]
            scores = np.linspace(0.9, 0.5, len(boxes))
            writer.add(dataset.image_id(i), labels, scores, np.clip(boxes, 0, 1))
    return str(path)


def test_detections_that_match_an_instance_are_cut_as_they_are(dataset, tmp_path):
    path = write_table(tmp_path / "x.parquet", dataset, moved=0.1)
    plan = make_plan(dataset, coded.config(proposals=path, proposal_share=1.0), 0)
    crops = plan.batch(0)
    assert not crops.jittered.any()
    for row, box in zip(crops.rows, crops.boxes, strict=True):
        truth = dataset.boxes[row].astype(float)
        truth[[0, 2]] += 0.1 * (truth[2] - truth[0])
        np.testing.assert_allclose(box, np.clip(truth, 0, 1), atol=1e-5)
    half = make_plan(dataset, coded.config(proposals=path, batch_size=100), 0)
    assert 0.4 < half.batch(0).jittered.mean() < 0.6
    far = write_table(tmp_path / "far.parquet", dataset, width=0.05)
    with pytest.raises(UserError, match="no box overlaps an instance of its label by IoU 0.5"):
        make_plan(dataset, coded.config(proposals=far), 0)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"sampler": "full"},
            "data.sampler: found 'full', expected one of 'uniform', 'class_aware'",
        ),
        ({"jitter": 0.5}, "data.jitter: found 0.5, expected"),
        ({"max_instances": -1}, "data.max_instances: found -1, expected 0"),
        ({"group_steps": 0}, "data.group_steps: found 0, expected at least 1"),
        ({"canvases": ()}, r"data.canvases: found \(\), expected pairs"),
        ({"train_split": "x"}, "no split 'x'"),
        (
            {"on_image_error": "stop"},
            "data.on_image_error: found 'stop', expected one of 'fatal', 'skip'",
        ),
    ],
)
def test_bad_fields_are_named(dataset, changes, found):
    with pytest.raises(UserError, match=found):
        train(dataset, coded.config(**changes))


def test_unreadable_photos_and_masks_stop_or_leave_an_empty_slot(tmp_path, capfd):
    broken = coded.write_dataset(tmp_path)
    (tmp_path / "photos" / "3.png").write_bytes(b"no photo")
    with pytest.raises(UserError, match=r"3\.png: cannot read the image"):
        list(inputs.eval_batches(broken, "train", coded.config(), batch_size=4))
    (tmp_path / "photos" / "7_0.png").unlink()
    skipping = coded.config(on_image_error="skip")
    batches = inputs.eval_batches(broken, "train", skipping, batch_size=1)
    empty = []
    for batch in batches:
        if not batch["image_valid"][0]:
            assert not batch["mask_valid"].any() and not batch["image"].any()
            empty.append(int(batch["instance_index"][0]))
    first, last = broken.box_offsets[[3, 7]]
    assert sorted(empty) == [first, first + 1, first + 2, first + 3, last]
    assert batches.skipped_images == 5
    told = capfd.readouterr().err
    assert "3.png: skipped, cannot read the image" in told
    assert "7.png: skipped, cannot read the mask" in told and "7_0.png" in told


def test_photos_of_unknown_size_are_cut_onto_the_planned_canvas(dataset):
    """Polygons need the size; of other masks only the plan's sorting suffers."""
    unknown = dataclasses.replace(dataset, image_sizes=np.zeros_like(dataset.image_sizes))
    valid = 0
    for batch in train(unknown, coded.config(on_image_error="skip"), num_steps=6):
        check_masks(dataset, {k: v[batch["image_valid"]] for k, v in batch.items()}, 0.06)
        valid += batch["image_valid"].sum()
    assert valid > 16
