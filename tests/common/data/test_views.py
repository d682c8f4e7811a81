"""Photos at several sizes: every one once, in its own format, whole at each scale."""

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.data.photo_errors import PhotoErrors
from common.data.views import DatasetPhotos, choose_format, format_canvases, view_batches
from common.io.errors import UserError

SIZES = [(30, 40), (40, 30), (20, 50), (33, 33), (60, 20), (30, 41), (48, 36)]  # height, width
RATIOS = (1.34, 2.0)
ROWS = [[np.array([0, 1])], [np.array([0]), np.array([1])]]  # whole blocks, then one by one


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    with DatasetWriter(tmp_path / "set", "x", ["a"], ["a"], None, str(tmp_path)) as writer:
        for i, (height, width) in enumerate(SIZES):
            Image.new("RGB", (width, height), (10 + i, 0, 0)).save(tmp_path / f"{i}.png")
            writer.add_image(f"{i}", f"{i}.png", (0, 0))
    return Dataset.open(tmp_path / "set")


def batches(dataset, on_image_error="fatal"):
    canvases = [format_canvases(side, RATIOS, max_long=50) for side in (16, 32)]
    assert canvases[1] == [(32, 43), (43, 32), (32, 50), (50, 32)]
    return list(
        view_batches(
            DatasetPhotos(dataset),
            np.arange(len(SIZES)),
            canvases,
            RATIOS,
            ROWS,
            PhotoErrors(on_image_error),
            pad_multiple=8,
            num_threads=2,
        )
    )


def test_every_photo_is_seen_whole_at_each_scale_on_a_canvas_of_its_format(dataset):
    seen = {0: [], 1: []}
    for batch in batches(dataset):
        assert len(batch.image_index) == 2
        for row, image, size in zip(batch.rows, batch.image, batch.image_size, strict=True):
            index = batch.image_index[row]
            if index < 0:
                assert not image.any()
                continue
            seen[batch.scale].append(index)
            height, width = size.astype(int)
            assert (image[:height, :width, 0] == 10 + index).all()
            assert not image[height:].any() and not image[:, width:].any()
            aspect = max(SIZES[index]) / min(SIZES[index])
            short = (16, 32)[batch.scale]
            # Up to the longest ratio the short side is that of the scale.
            longest = 2.0 if batch.scale == 0 else 50 / 32
            assert min(height, width) == (
                short if aspect < longest else round(min(short * 2, 50) / aspect)
            )
            assert (height > width) == (SIZES[index][0] > SIZES[index][1])
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(len(SIZES)))
    assert sum(batch.last for batch in batches(dataset)) == 4  # one block a format


def test_the_tightest_format_is_chosen():
    formats = [choose_format(size, RATIOS) for size in SIZES]
    assert formats == [0, 1, 2, 0, 3, 2, 1]
    assert choose_format((90, 10), RATIOS) == 3  # too long for any: shrunk on the longest


def test_unreadable_photos_stop_or_are_left_out(dataset, tmp_path, capfd):
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "5.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"[25]\.png: cannot read the image"):
        batches(dataset)
    whole, broken = set(), set()
    for batch in batches(dataset, "skip"):
        index = batch.image_index[batch.rows]
        whole |= set(index[batch.image_valid].tolist())
        broken |= set(index[~batch.image_valid].tolist())
    assert whole == set(range(len(SIZES))) - {2, 5} and broken == {-1, 2}
    assert "2.png: skipped" in capfd.readouterr().err
