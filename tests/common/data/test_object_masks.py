"""Masks in training batches: cropped to their boxes on the canvas, and which objects have one."""

import numpy as np
import pytest
from PIL import Image

from common.data import input as inputs
from common.data.dataset import CROWD, GROUP_OF, Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from common.data.settings import SourceSettings
from common.io.errors import UserError
from common.masks import rle
from tests.common.data.factories import data_settings

SIZE, HEIGHT, WIDTH = 16, 60, 90


def photo_and_masks(seed):
    """A photo that shows three ellipses in red, green and blue, and their masks and boxes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    masks, boxes = [], []
    for channel in range(3):
        centre, radii = rng.uniform([18, 18], [42, 72]), rng.uniform(8, 17, 2)
        mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        pixels[mask, channel] = 255
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        masks.append(mask)
    return pixels, masks, np.array(boxes) / [WIDTH, HEIGHT, WIDTH, HEIGHT]


def entry(mask):
    return {"size": [HEIGHT, WIDTH], "counts": rle.encode([mask])[0].decode()}


def write(folder, num_images=4, change=lambda entries: entries, has_masks=True, flags=(0, 0, 0)):
    folder.mkdir(exist_ok=True)
    labels = ["a", "b", "c"]
    options = dict(has_masks=has_masks)
    with DatasetWriter(folder / "set", "s", labels, labels, None, str(folder), **options) as writer:
        for i in range(num_images):
            pixels, masks, boxes = photo_and_masks(i)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            entries = change([entry(mask) for mask in masks]) if has_masks else None
            writer.add_image(
                f"{i}", f"{i}.png", (HEIGHT, WIDTH), boxes, [0, 1, 2], flags, masks=entries
            )
        writer.add_split("train", range(num_images))
    return Dataset.open(folder / "set")


def read(dataset, **changes):
    settings = data_settings(**{"canvas": (64, 96), "batch_size": 4, "mask_size": SIZE} | changes)
    plan = train_plan(dataset, settings, 3)
    return inputs.train_batches(dataset, plan, settings, seed=5, num_steps=4)


def unpacked(batch, slot, place):
    return np.unpackbits(batch["gt_masks"][slot, place], axis=1).astype(bool)


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.8, 1.6)])
def test_masks_are_what_the_canvas_shows_in_each_box(tmp_path, jitter):
    """Ellipses are painted, each in a colour channel of its own: the photo is the ground truth."""
    seen = mirrored = cropped = 0
    for batch in read(write(tmp_path), scale_jitter=jitter):
        assert batch["gt_masks"].shape == (4, 10, SIZE, SIZE // 8)
        assert batch["gt_masks"].dtype == np.uint8
        np.testing.assert_array_equal(batch["gt_has_mask"], batch["gt_valid"])
        for slot, place in zip(*np.nonzero(batch["gt_has_mask"]), strict=True):
            x0, y0, x1, y1 = batch["gt_boxes"][slot, place].tolist()
            channel = batch["image"][slot, ..., batch["gt_classes"][slot, place]]
            y = (y0 + (np.arange(SIZE) + 0.5) * (y1 - y0) / SIZE).astype(int)
            x = (x0 + (np.arange(SIZE) + 0.5) * (x1 - x0) / SIZE).astype(int)
            painted = channel[np.ix_(y, x)].astype(float)
            sure = abs(painted - 127.5) > 115  # outlines are blurred
            assert sure.mean() > 0.6
            agree = (unpacked(batch, slot, place) == (painted > 127.5))[sure]
            assert agree.mean() > 0.98
            seen += 1
            cropped += x1 - x0 == batch["image_size"][slot, 1]
        mirrored += len(batch["image"])
    assert seen > 30 and mirrored


def test_mirrored_masks_are_mirrored(tmp_path):
    dataset = write(tmp_path)
    options = dict(scale_jitter=(1.0, 1.0), batch_size=4)
    plain = {}
    for batch in read(dataset, flip=False, **options):
        for slot, index in enumerate(batch["image_index"].tolist()):
            plain[index] = batch["gt_masks"][slot], batch["gt_boxes"][slot]
    turned = 0
    for batch in read(dataset, **options):
        for slot, index in enumerate(batch["image_index"].tolist()):
            masks, boxes = plain[index]
            if (boxes == batch["gt_boxes"][slot]).all():
                np.testing.assert_array_equal(batch["gt_masks"][slot], masks)
                continue
            turned += 1
            for place in range(3):
                expected = np.unpackbits(masks[place], axis=1)[:, ::-1]
                # A pixel whose centre is on a border of the file may fall to either side.
                assert (unpacked(batch, slot, place) == expected).mean() > 0.95
    assert turned > 3


def test_objects_without_mask_and_empty_masks_have_none(tmp_path):
    nothing = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    dataset = write(tmp_path, change=lambda entries: [None, nothing, entries[2]])
    for batch in read(dataset):
        assert batch["gt_valid"][:, :3].all()
        has_mask = batch["gt_has_mask"]
        np.testing.assert_array_equal(has_mask, (batch["gt_classes"] == 2) & batch["gt_valid"])
        assert not batch["gt_masks"][~has_mask].any() and batch["gt_masks"][has_mask].any()


def test_masks_stay_with_their_objects_when_others_are_left_out(tmp_path):
    whole = write(tmp_path / "a")
    parts = write(tmp_path / "b", flags=[CROWD | GROUP_OF, 0, 0])
    options = dict(flip=False, scale_jitter=(1.0, 1.0))
    for every, some in zip(read(whole, **options), read(parts, **options), strict=True):
        np.testing.assert_array_equal(some["gt_masks"][:, :2], every["gt_masks"][:, 1:3])
        np.testing.assert_array_equal(some["gt_has_mask"].sum(1), [2] * 4)


def test_masks_of_a_subset_of_many_boxes_are_those_of_the_subset(tmp_path):
    dataset = write(tmp_path)
    options = dict(flip=False, scale_jitter=(1.0, 1.0))
    of_class = {}
    for batch in read(dataset, **options):
        for slot, index in enumerate(batch["image_index"].tolist()):
            for place in range(3):
                of_class[index, batch["gt_classes"][slot, place]] = batch["gt_masks"][slot, place]
    chosen = set()
    for batch in read(dataset, max_boxes=1, **options):
        for slot, index in enumerate(batch["image_index"].tolist()):
            key = index, batch["gt_classes"][slot, 0]
            np.testing.assert_array_equal(batch["gt_masks"][slot, 0], of_class[key])
            chosen.add(key)
    assert len(chosen) > 4


def test_batches_without_mask_size_have_no_masks(tmp_path):
    assert not {"gt_masks", "gt_has_mask"} & next(read(write(tmp_path), mask_size=0)).keys()


def test_only_sources_with_masks_have_masks(tmp_path):
    with_masks, boxes = write(tmp_path / "a"), write(tmp_path / "b", has_masks=False)
    masks = SourceSettings(dir=str(with_masks.directory), annotations="boxes_masks")
    unused = SourceSettings(dir=str(with_masks.directory))
    none = SourceSettings(dir=str(boxes.directory))
    for batch in read(with_masks, sources=(masks, unused, none), batch_size=6):
        assert batch["gt_valid"].any(1).all()
        np.testing.assert_array_equal(batch["gt_has_mask"].any(1), batch["source"] == 0)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), r"b.set: the dataset has no masks, config.data.mask_size is 16"),
        (("boxes",), r"config.data.sources: none has annotations 'boxes_masks'"),
        (("boxes_masks",), r"config.data.sources\[0\]: annotations 'boxes_masks', but .*b.set has"),
    ],
)
def test_a_run_with_masks_needs_masks(tmp_path, sources, message):
    dataset = write(tmp_path / "b", has_masks=False)
    with pytest.raises(UserError, match=message):
        read(dataset, sources=tuple(SourceSettings(annotations=kind) for kind in sources))


def test_a_mask_that_cannot_be_read_is_fatal_or_skipped(tmp_path, capfd):
    dataset = write(tmp_path, change=lambda entries: [{"png": "gone.png"}, *entries[1:]])
    with pytest.raises(UserError, match=r"\d.png: cannot read the mask: .*box 0 \(a\).*gone.png"):
        list(read(dataset))
    batches = read(dataset, on_image_error="skip")
    for batch in batches:
        np.testing.assert_array_equal(
            batch["gt_has_mask"], batch["gt_valid"] & (batch["gt_classes"] > 0)
        )
        assert batch["image_valid"].all()
    assert batches.skipped_masks == 16 and "16 unreadable masks skipped" in batches.left_out
    assert capfd.readouterr().err.count("0.png: skipped, cannot read the mask") == 1


@pytest.mark.parametrize("size", [-8, 12, 1])
def test_wrong_mask_sizes_are_refused(size):
    with pytest.raises(UserError, match="^mask_size: found"):
        data_settings(mask_size=size)
