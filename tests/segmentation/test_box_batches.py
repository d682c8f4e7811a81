"""Boxes of a table: each is cut once in every view, each photo is decoded once."""

import numpy as np
import pytest

from common.data import images
from common.data.dataset import Dataset
from common.io.errors import UserError
from segmentation.crops.batches import View, box_batches
from tests.segmentation import coded_photos as coded

SHORT = View(coded.size(short=24, long=72), ((32, 32), (32, 72), (72, 32)))
FIXED = View(coded.size(fixed=(20, 28)), ((20, 28),))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return coded.write_dataset(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def table(dataset):
    """Photo of each box and boxes: up to six random ones a photo, photo 5 has none."""
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 7, dataset.num_images)
    counts[5] = 0
    corners = np.sort(rng.random((counts.sum(), 2, 2)), axis=1)
    corners[:, 1] = np.minimum(corners[:, 1] + 0.1, 1)
    return np.repeat(np.arange(dataset.num_images), counts), corners.reshape(-1, 4)


def blocks(batches, num_views):
    batches = list(batches)
    assert [b.view for b in batches] == list(range(num_views)) * (len(batches) // num_views)
    return [batches[i : i + num_views] for i in range(0, len(batches), num_views)]


def test_every_box_comes_once_and_the_views_of_a_block_share_its_slots(dataset, table):
    image_index, boxes = table
    seen = []
    for block in blocks(box_batches(dataset, image_index, boxes, [SHORT, FIXED], batch_size=4), 2):
        for batch, view in zip(block, (SHORT, FIXED), strict=True):
            np.testing.assert_array_equal(batch.rows, block[0].rows)
            assert batch.image.shape[1:3] in view.canvases
            assert batch.image.shape[0] == 4
            np.testing.assert_array_equal(batch.image_valid, batch.rows >= 0)
        seen += batch.rows[batch.rows >= 0].tolist()
    assert sorted(seen) == list(range(len(boxes)))


def test_content_shows_the_window_of_the_box(dataset, table):
    image_index, boxes = table
    for (batch,) in blocks(box_batches(dataset, image_index, boxes, [SHORT], batch_size=3), 1):
        for slot in np.flatnonzero(batch.image_valid):
            row = batch.rows[slot]
            assert batch.image_index[slot] == image_index[row]
            size = dataset.image_sizes[image_index[row]]
            assert batch.photo_size[slot].tolist() == size.tolist()
            scale = np.array([size[1], size[0]] * 2)
            np.testing.assert_allclose(batch.window[slot], boxes[row] * scale, rtol=1e-5)
            height, width = batch.image_size[slot].astype(int)
            image = batch.image[slot, :height, :width] / 255
            assert not batch.image[slot, height:].any() and not batch.image[slot, :, width:].any()
            shown = np.array([image[0, 0, :2], image[-1, -1, :2]]).ravel()
            inset = (boxes[row, 2:] - boxes[row, :2]) / (2 * np.array([width, height]))
            np.testing.assert_allclose(shown, boxes[row] + [*inset, *-inset], atol=0.02)


def test_a_photo_is_decoded_once_whatever_its_boxes_and_views(dataset, table, monkeypatch):
    decoded = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(1) or decode(*args))
    list(box_batches(dataset, *table, [SHORT, FIXED], batch_size=4))
    assert len(decoded) == len(np.unique(table[0])) == dataset.num_images - 1


def test_batches_do_not_depend_on_the_number_of_threads(dataset, table):
    one, many = (
        list(box_batches(dataset, *table, [SHORT], batch_size=4, num_threads=n)) for n in (1, 6)
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.image, b.image)


def test_boxes_without_area_in_the_photo_have_no_content(dataset):
    boxes = np.array([[0.5, 0.5, 0.5, 0.9], [1.0, 0.2, 1.3, 0.4], [-0.5, 0.2, 0.5, 1.5],
                      [0.2, 0.2, 0.2001, 0.9]])  # fmt: skip
    (batch,) = box_batches(dataset, np.zeros(4, int), boxes, [FIXED], batch_size=5)
    assert batch.rows.tolist() == [0, 1, 2, 3, -1]
    assert batch.image_valid.tolist() == [False, False, True, True, False]
    height, width = dataset.image_sizes[0]
    assert batch.window[2].tolist() == [0, np.float32(0.2 * height), width / 2, height]
    assert not batch.window[:2].any() and not batch.image[:2].any()


def test_unreadable_photos_stop_or_leave_their_boxes_without_content(dataset, tmp_path):
    lost = coded.write_dataset(tmp_path)
    (tmp_path / "photos" / "1.png").unlink()
    image_index, boxes = np.array([0, 1, 1]), np.tile([0.1, 0.1, 0.6, 0.6], (3, 1))
    with pytest.raises(UserError, match=r"1\.png: cannot read the image: No such file"):
        list(box_batches(lost, image_index, boxes, [FIXED], batch_size=4))
    (batch,) = box_batches(lost, image_index, boxes, [FIXED], batch_size=4, on_image_error="skip")
    assert batch.image_valid.tolist() == [True, False, False, False]
    assert batch.photo_size[1].tolist() == list(coded.SIZES[1])


def test_no_boxes_give_no_batches(dataset):
    assert not list(box_batches(dataset, np.zeros(0, int), np.zeros((0, 4)), [SHORT], batch_size=4))
