"""Which part of a photo elaborate augmentation shows, and how large: around the drawn box."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from common.data import placement
from common.data.augmentation import NUM_DRAWS, ElaborateAugmentation
from common.data.box_shapes import RATIO_BINS
from common.data.dataset import Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from tests.common.data.elaborate import CROP, changed, read, settings


def augmentation(dataset, **changes) -> ElaborateAugmentation:
    data = settings(mask_size=0, **changes)
    plan = train_plan(dataset, data, 0)
    return ElaborateAugmentation.of(plan.sources, data, plan.pools)


def one_box(tmp_path, box, size=(600, 1000)) -> Dataset:
    with DatasetWriter(tmp_path / "one", "o", ["a"], ["a"], None, str(tmp_path)) as writer:
        writer.add_image("0", "0.jpg", size, np.array([box]), [0], [0])
        writer.add_split("train", [0])
    return Dataset.open(tmp_path / "one")


def geometries(dataset, how, canvas=(80, 133), size=(600, 1000), count=400):
    source = train_plan(dataset, settings(mask_size=0), 0).sources[0]
    draws = np.random.default_rng(0).random((count, NUM_DRAWS)).tolist()
    return [how.geometry(size, canvas, source, 0, 0, draw) for draw in draws]


@pytest.mark.parametrize("scale", ["crop", "resize"])
def test_windows_cover_the_box_and_ratios_follow_the_histogram(tmp_path, scale):
    dataset = one_box(tmp_path, [0.4, 0.4, 0.5, 0.55])
    how = augmentation(dataset, elaborate=changed(scale=scale, rotate=False, max_zoom=8.0))
    ratios = np.zeros(RATIO_BINS)
    ratios[[150, 300, 450]] = 1, 2, 1
    cumulative = np.concatenate([[0], np.cumsum(ratios) / 4])
    how = dataclasses.replace(how, cumulative=cumulative)
    found = []
    for geometry in geometries(dataset, how):
        boxes, keep = placement.transform_boxes(dataset.boxes, geometry)
        assert keep[0] and not geometry.angle
        # Rounded to whole pixels of the window, of which the box may lose a part of one.
        sides = dataset.boxes[0] * np.tile(geometry.full[::-1], 2)
        np.testing.assert_allclose(boxes[0, 2:] - boxes[0, :2], sides[2:] - sides[:2], atol=1.01)
        longer = (boxes[0, 2:] - boxes[0, :2]).max()
        found.append(longer / (133 if scale == "resize" else max(geometry.content)))
        assert all(0 < c <= f for c, f in zip(geometry.content, geometry.full, strict=True))
    found = np.array(found)
    for ratio, share in ((0.15, 0.25), (0.3, 0.5), (0.45, 0.25)):
        assert abs((abs(found - ratio) < 0.02).mean() - share) < 0.08


@pytest.mark.parametrize("scale", ["crop", "resize"])
@pytest.mark.parametrize(
    "box",
    [
        [0.0, 0.0, 1.0, 1.0],  # fills the photo
        [0.5, 0.5, 0.501, 0.501 + 1 / 1500],  # one pixel
        [0.0, 0.0, 0.02, 1.0],  # a border
        [0.3, 0.3, 0.3, 0.6],  # no area
    ],
)
def test_extreme_boxes(tmp_path, scale, box):
    dataset = one_box(tmp_path, box)
    how = augmentation(dataset, elaborate=changed(scale=scale))
    for geometry in geometries(dataset, how, count=100):
        _, keep = placement.transform_boxes(dataset.boxes, geometry)
        assert keep[0] == (box[2] > box[0])
        assert max(geometry.full) <= 4 * 133 + 1 and min(geometry.content) >= 1
        assert all(
            0 <= o <= f - c
            for o, f, c in zip(geometry.offset, geometry.full, geometry.content, strict=True)
        )
        if box == [0.0, 0.0, 1.0, 1.0] and scale == "crop":
            assert geometry.content == geometry.full == (80, 133)


def test_photos_that_are_only_turned_keep_the_jitter(tmp_path):
    dataset = one_box(tmp_path, [0.4, 0.4, 0.5, 0.55])
    turned = augmentation(
        dataset, elaborate=changed(scale="none", rotate=True), scale_jitter=(0.5, 0.6)
    )
    found = geometries(dataset, turned)
    widths = [geometry.full[1] for geometry in found]
    assert 66 <= min(widths) < 69 and 77 < max(widths) <= 80
    assert any(geometry.angle for geometry in found)


def test_boxes_outside_the_photo_are_no_boxes_to_crop_around(tmp_path):
    dataset = one_box(tmp_path, [1.0, 0.2, 1.01, 0.5])
    for geometry in geometries(dataset, augmentation(dataset, elaborate=CROP), count=20):
        assert geometry.full == geometry.content == (80, 133)


def test_what_is_left_of_a_cut_object_is_ignored(tmp_path):
    """Crops lie within the large object, of which too little is seen to be one."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg")
    names = ["large", "small", "other"]
    boxes = [[0, 0, 1, 1], [0.5, 0.5, 0.58, 0.58], [0, 0, 0.4, 0.4]]
    with DatasetWriter(tmp_path / "one", "o", names, names, None, str(tmp_path)) as writer:
        writer.add_image("0", "0.jpg", (600, 900), boxes, [0, 1, 2])
        writer.add_split("train", [0])
    dataset = Dataset.open(tmp_path / "one")
    elaborate = changed(scale="crop", rotate=False, max_zoom=8.0)
    batches = read(dataset, num_steps=8, mask_size=0, elaborate=elaborate, batch_size=2)
    seen, cut = 0, 0
    for batch in batches:
        for row in range(2):
            classes = batch["gt_classes"][row][batch["gt_valid"][row]].tolist()
            regions = batch["ignore_boxes"][row][batch["ignore_valid"][row]]
            seen, cut = seen + (0 in classes), cut + (0 not in classes)
            if 0 not in classes:
                height, width = batch["image_size"][row]
                assert [0, 0, width, height] in regions.tolist()
    assert seen and cut


def test_long_classes_turn_further(tmp_path):
    degrees = []
    for box in ([0.4, 0.4, 0.5, 0.5], [0.4, 0.4, 0.44, 0.9]):
        dataset = one_box(tmp_path / str(len(degrees)), box)
        angles = [g.angle for g in geometries(dataset, augmentation(dataset), count=2000)]
        degrees.append(np.degrees(np.std(angles)))
    assert abs(degrees[0] - 5) < 0.4
    assert degrees[1] > 20  # 30, but for boxes that would leave the frame
