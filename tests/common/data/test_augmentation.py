"""Turned and cropped photos: what a canvas shows, and where boxes, masks and regions lie there."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from common.data import images, placement
from common.data.box_shapes import RATIO_BINS, box_shapes
from common.data.dataset import CROWD, GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from tests.common.data.elaborate import CROP, MASK, changed, read, settings

HEIGHT, WIDTH = 60, 90


def ellipses(seed):
    """A photo that shows three ellipses in red, green and blue, their masks and boxes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    masks, boxes = [], []
    for channel in range(3):
        centre, radii = rng.uniform([20, 25], [40, 65]), rng.uniform(6, 15, 2)
        mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        pixels[mask, channel] = 255
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        masks.append(mask)
    return pixels, masks, np.array(boxes) / [WIDTH, HEIGHT, WIDTH, HEIGHT]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("ellipses")
    labels = ["a", "b", "c"]
    with DatasetWriter(folder / "set", "s", labels, labels, None, str(folder), has_masks=True) as w:
        for i in range(6):
            pixels, masks, boxes = ellipses(i)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            entries = [
                {"size": [HEIGHT, WIDTH], "counts": rle.encode([m])[0].decode()} for m in masks
            ]
            flags = [0, 0, CROWD | GROUP_OF if i == 5 else 0]
            w.add_image(f"{i}", f"{i}.png", (HEIGHT, WIDTH), boxes, [0, 1, 2], flags, masks=entries)
        w.add_split("train", range(6))
        w.add_split("validation", range(2))
    return Dataset.open(folder / "set")


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


# ---------------------------------------------------------------------------------- one affine map


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", [0.0, 0.4, -1.1])
@pytest.mark.parametrize("full", [(150, 225), (70, 105), (40, 60)])  # much and little enlarged
def test_every_pixel_shows_the_place_that_the_boxes_go_to(full, angle, flip):
    """A photo whose colours tell the place; tiny boxes are the points that are followed."""
    y, x = (np.arange(side) + 0.5 for side in (HEIGHT, WIDTH))
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    pixels[..., 0], pixels[..., 1] = 255 * x / WIDTH, 255 * y[:, None] / HEIGHT
    file = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(file, "png")
    offset, shape = [(int(part * full[0]), int(part * full[1])) for part in (0.14, 0.6)]
    geometry = placement.Geometry(full, offset, shape, flip, angle)
    content = placement.draw_content(images.open_photo(file.getvalue()), geometry).astype(float)
    assert content.shape == (*shape, 3)
    points = np.random.default_rng(0).uniform(0.05, 0.95, (300, 2)).astype(np.float32)
    boxes, keep = placement.transform_boxes(
        np.concatenate([points - 2e-3, points + 2e-3], axis=1), geometry
    )
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = keep & (centres > 3).all(1) & (centres < np.array(shape[::-1]) - 3).all(1)
    assert inside.sum() > 30
    column, row = np.floor(centres[inside]).astype(int).T
    shown = content[row, column, :2] / 255
    assert np.abs(shown - points[inside]).max() < 0.03  # two pixels of the photo


def test_turned_boxes_are_the_hull_of_their_corners_or_of_their_ellipse():
    rng = np.random.default_rng(1)
    corners = np.sort(rng.uniform(0.3, 0.7, (50, 2, 2)), axis=1).astype(np.float32)
    boxes = corners.reshape(50, 4)
    geometry = placement.Geometry((100, 160), (0, 0), (100, 160), False, 0.7)
    hulls, keep = placement.transform_boxes(boxes, geometry)
    tight, _ = placement.transform_boxes(boxes, geometry, ellipse=True)
    assert keep.all()
    around = np.linspace(0, 2 * np.pi, 3000)
    for box, hull, inner in zip(boxes, hulls, tight, strict=True):
        x0, y0, x1, y1 = box * [160, 100, 160, 100]
        turned = np.stack(geometry.turn(np.array([x0, x1, x0, x1]), np.array([y0, y0, y1, y1])), 1)
        np.testing.assert_allclose(hull, [*turned.min(0), *turned.max(0)], atol=1e-3)
        x = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(around)
        y = (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(around)
        curve = np.stack(geometry.turn(x, y), 1)
        np.testing.assert_allclose(inner, [*curve.min(0), *curve.max(0)], atol=1e-3)


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_photos_with_exif_orientation_turn_as_displayed(orientation):
    shown = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (15, 10, 3)), 4, 0), 4, 1)
    shown = shown.astype(np.uint8)
    undo = {3: 3, 6: 2, 7: 6}[orientation]  # Pillow's operation, displayed to stored
    files = []
    for tagged in (False, True):
        image, exif = Image.fromarray(shown), Image.Exif()
        if tagged:
            image, exif[0x0112] = image.transpose(Image.Transpose(undo)), orientation
        file = io.BytesIO()
        image.save(file, "png", exif=exif)
        files.append(images.open_photo(file.getvalue()))
    geometry = placement.Geometry((120, 80), (10, 5), (60, 64), True, 0.3)
    plain, turned = (placement.draw_content(photo, geometry) for photo in files)
    np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("full", [(700, 900), (260, 340)])  # enlarged, shrunk
def test_of_a_large_photo_the_part_is_decoded_that_is_turned(monkeypatch, full):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    smooth = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    smooth.save(file, "jpeg", quality=90, exif=exif)
    shape = (full[0] // 4, full[1] // 4)
    geometry = placement.Geometry(full, (full[0] // 3, full[1] // 3), shape, True, 0.3)
    whole = placement.draw_content(images.open_photo(file.getvalue()), geometry).astype(int)
    sizes = []
    decode_part = images._decode_part
    monkeypatch.setattr(
        images, "_decode_part", lambda *a: sizes.append(decode_part(*a)) or sizes[-1]
    )
    monkeypatch.setattr(placement, "_LARGE", 0)
    part = placement.draw_content(images.open_photo(file.getvalue()), geometry)
    assert np.prod(sizes[0].image.size) < 0.4 * np.prod(sizes[0].extent)
    assert np.abs(part - whole).max() <= 2


def test_shrunk_photos_are_antialiased():
    """Stripes of one pixel become grey: nothing of them may shimmer in a turned photo either."""
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "png")
    geometry = placement.Geometry((100, 100), (20, 20), (60, 60), False, 0.2)
    content = placement.draw_content(images.open_photo(file.getvalue()), geometry)
    assert content.astype(float).std() < 4


# ---------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("elaborate", [CROP, changed(scale="resize", boxes="ellipse")])
def test_boxes_and_masks_are_what_the_canvas_shows(dataset, elaborate):
    """Ellipses are painted, each in a colour channel of its own: the photo is the ground truth."""
    agreement = []
    for batch in read(dataset, elaborate=elaborate):
        assert batch["image_valid"].all()
        for slot, place in zip(*np.nonzero(batch["gt_valid"]), strict=True):
            channel = batch["image"][slot, ..., batch["gt_classes"][slot, place]].astype(float)
            x0, y0, x1, y1 = batch["gt_boxes"][slot, place].tolist()
            y = (y0 + (np.arange(MASK) + 0.5) * (y1 - y0) / MASK).astype(int)
            x = (x0 + (np.arange(MASK) + 0.5) * (x1 - x0) / MASK).astype(int)
            painted = channel[np.ix_(y, x)]
            sure = abs(painted - 116) > 100  # outlines are blurred, the border is (124, 116, 104)
            mask = np.unpackbits(batch["gt_masks"][slot, place], axis=1).astype(bool)
            if min(x1 - x0, y1 - y0) < 8 or sure.mean() < 0.4:
                continue
            agreement.append((mask == (painted > 128))[sure].mean())
    assert len(agreement) > 40 and min(agreement) > 0.85 and np.mean(agreement) > 0.98


def test_the_drawn_class_is_on_the_canvas(dataset):
    for batch in read(dataset):
        there = (batch["gt_classes"] == batch["drawn_class"][:, None]) & batch["gt_valid"]
        assert there.any(1).all()


def test_regions_to_ignore_are_turned_as_hulls(dataset):
    index = 5  # whose third box is a crowd
    for batch in read(dataset, elaborate=changed(boxes="ellipse"), num_steps=8):
        for slot in np.flatnonzero(batch["image_index"] == index):
            blue = batch["image"][slot, ..., 2] > 200
            if not blue.any():
                continue
            (region,) = batch["ignore_boxes"][slot][batch["ignore_valid"][slot]]
            rows, columns = np.nonzero(blue)
            assert columns.min() >= region[0] - 2 and columns.max() <= region[2] + 2
            assert rows.min() >= region[1] - 2 and rows.max() <= region[3] + 2


def test_resume_and_two_hosts_give_the_same_bytes(dataset):
    whole = read(dataset, num_steps=5)
    assert_equal(read(dataset, start_step=3, num_steps=2), whole[3:])
    halves = [read(dataset, num_steps=5, process=(host, 2)) for host in range(2)]
    together = [
        {name: np.concatenate([half[step][name] for half in halves]) for name in whole[step]}
        for step in range(5)
    ]
    assert_equal(together, whole)
    # The same photos in the same places as without augmentation, which changes nothing else.
    plain = read(dataset, num_steps=5, elaborate=changed(scale="none", rotate=False))
    for batch, other in zip(whole, plain, strict=True):
        np.testing.assert_array_equal(batch["image_index"], other["image_index"])


# ---------------------------------------------------------------------------------- statistics


def test_box_shapes_are_kept_with_the_dataset(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 500, (40, 2))
    all_boxes, all_classes, all_flags = [], [], []
    with DatasetWriter(tmp_path / "set", "s", ["a", "b", "c"], ["a", "b", "c"], None, "") as writer:
        for i, size in enumerate(sizes):
            corners = np.sort(rng.random((2, i % 5, 2)), axis=0)
            boxes = np.concatenate([corners[0], corners[1]], axis=1).astype(np.float32)
            classes = rng.integers(0, 2, len(boxes))
            flags = np.where(rng.random(len(boxes)) < 0.2, GROUP_OF, 0)
            writer.add_image(f"{i}", f"{i}.jpg", size, boxes, classes, flags)
            all_boxes += [box * np.tile(size[::-1], 2) for box in boxes]
            all_classes += classes.tolist()
            all_flags += flags.tolist()
        writer.add_split("train", range(40))
    dataset = Dataset.open(tmp_path / "set")
    shapes = box_shapes(dataset, dataset.split("train"), GROUP_OF)
    pixels, classes = np.array(all_boxes), np.array(all_classes)
    owners = np.repeat(np.arange(40), np.arange(40) % 5)
    keep = np.array(all_flags) == 0
    sides = pixels[:, 2:] - pixels[:, :2]
    aspects = sides.max(1) / sides.min(1)
    for class_ in range(2):
        expected = np.median(aspects[keep & (classes == class_)])
        assert shapes.aspects[class_] == pytest.approx(expected, rel=1e-5)
    assert shapes.counts.tolist() == [*np.bincount(classes[keep], minlength=2), 0]
    assert shapes.aspects[2] == 1
    ratios = (sides.max(1) / sizes[owners].max(1))[keep]
    expected, _ = np.histogram(ratios, RATIO_BINS, (0, 1))
    assert np.abs(np.cumsum(shapes.ratios) - np.cumsum(expected)).max() <= 1  # rounding at edges
    (kept,) = (dataset.directory / "statistics").iterdir()
    again = box_shapes(dataset, dataset.split("train"), GROUP_OF)
    for found, first in zip(again, shapes, strict=True):
        np.testing.assert_array_equal(found, first)
    kept.write_bytes(b"damaged")
    assert box_shapes(dataset, dataset.split("train"), GROUP_OF).counts.sum() == keep.sum()
    box_shapes(dataset, dataset.split("train"), 0)
    assert len(list((dataset.directory / "statistics").iterdir())) == 2
    mended = np.array(dataset.boxes)
    mended[keep.argmax(), 2:] = mended[keep.argmax(), :2]  # corrected, as many as before
    corrected = dataclasses.replace(dataset, boxes=mended)
    again = box_shapes(corrected, dataset.split("train"), GROUP_OF)
    assert again.counts.sum() == keep.sum() - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale_jitter=(0.8, 1.2)), "scale_jitter: found .* beside elaborate.scale 'crop'"),
        (
            dict(sampler="uniform", pools="openimages"),
            "pools: found 'openimages', expected '' with",
        ),
    ],
)
def test_fields_that_contradict_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)
