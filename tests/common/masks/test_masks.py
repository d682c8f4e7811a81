"""Truth masks of any make, in any frame or window; what is wrong with one is told in one line."""

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from common.masks.dataset_masks import MaskError, MaskReader

PHOTO = (40, 60)
BOX = (0.1, 0.1, 0.9, 0.8)


def blob(height, width):
    """An ellipse well inside BOX."""
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) / height, (x + 0.5) / width
    return ((x - 0.5) / 0.35) ** 2 + ((y - 0.45) / 0.3) ** 2 < 1


def reader(tmp_path, entries, *, boxes=None, size=PHOTO, root=""):
    boxes = boxes or [BOX] * len(entries)
    with DatasetWriter(
        tmp_path / "set",
        "test",
        ["tree"],
        ["Tree"],
        None,
        has_masks=True,
        extra={"mask_root": root} if root else {},
    ) as writer:
        # The masks asked for are those of the second image.
        writer.add_image("first", "f.jpg", size, [BOX], [0], masks=[None])
        writer.add_image("im", "i.jpg", size, boxes, [0] * len(boxes), masks=entries)
    return MaskReader(Dataset.open(tmp_path / "set"))


def at_centres(mask, box, size):
    """The value of a mask at the centre of every pixel of a window, one by one."""
    result = np.zeros(size, bool)
    for row, column in np.ndindex(size):
        y = box[1] + (row + 0.5) / size[0] * (box[3] - box[1])
        x = box[0] + (column + 0.5) / size[1] * (box[2] - box[0])
        if 0 <= y < 1 and 0 <= x < 1:
            result[row, column] = mask[int(y * mask.shape[0]), int(x * mask.shape[1])]
    return result


FORMS = ("png1", "png8", "compressed", "uncompressed")


@pytest.mark.parametrize("form", FORMS)
def test_any_form_and_resolution_in_any_frame_and_window(tmp_path, form):
    mask = blob(47, 71)
    counts = rle.encode([mask])[0]
    if form.startswith("png"):
        image = Image.fromarray(mask)
        image.convert("L" if form == "png8" else "1").save(tmp_path / "m.png")
        entry, root = {"png": "m.png"}, str(tmp_path)
    else:
        runs = rle.decode_runs([counts])[0].tolist()
        entry, root = {"size": [47, 71], "counts": runs}, ""
        if form == "compressed":
            entry["counts"] = counts.decode()
    masks = reader(tmp_path, [None, entry], root=root)
    assert masks.has_mask(np.arange(3)).tolist() == [False, False, True]
    assert masks.rle(1, PHOTO) is None and masks.is_empty(1) and not masks.is_empty(2)
    for size in ((47, 71), PHOTO, (13, 90), (200, 300)):
        expected = at_centres(mask, (0, 0, 1, 1), size)
        np.testing.assert_array_equal(rle.decode(masks.rle(2, size), size), expected)
    for box in (BOX, (-0.21, 0.33, 0.71, 1.43), (0.3, 0.4, 0.301, 0.403), (1.5, 0, 2, 1)):
        for size in ((12, 9), (31, 50)):
            window = masks.window(2, box, size)
            np.testing.assert_array_equal(window, at_centres(mask, box, size))


def test_polygons_are_drawn_in_the_frame_asked_for(tmp_path):
    square = [[10.0, 8.0, 50.0, 8.0, 50.0, 30.0, 10.0, 30.0]]
    masks = reader(tmp_path, [square])
    for scale in (1, 3):
        size = (40 * scale, 60 * scale)
        expected = np.zeros(size, bool)
        expected[8 * scale : 30 * scale, 10 * scale : 50 * scale] = True
        np.testing.assert_array_equal(rle.decode(masks.rle(1, size), size), expected)
    # A window of 30 to 70 by -10 to 30, one pixel in four.
    window = masks.window(1, (30 / 60, -10 / 40, 70 / 60, 30 / 40), (20, 20))
    expected = np.zeros((20, 20), bool)
    expected[9:20, :10] = True
    np.testing.assert_array_equal(window, expected)


def test_polygons_end_with_the_photo(tmp_path):
    masks = reader(tmp_path, [[[30, 20, 99, 20, 99, 80, 30, 80]]])
    window = masks.window(1, (0.5, 0.5, 1.5, 1.5), (20, 30))
    expected = np.zeros((20, 30), bool)
    expected[:10, :15] = True
    np.testing.assert_array_equal(window, expected)


def test_parts_of_a_polygon_mask_are_united(tmp_path):
    parts = [[0, 0, 20, 0, 20, 40, 0, 40], [10, 0, 30, 0, 30, 40, 10, 40]]
    masks = reader(tmp_path, [parts])
    assert rle.areas([masks.rle(1, PHOTO)]).tolist() == [30 * 40]
    assert masks.window(1, (0, 0, 1, 1), PHOTO)[:, :30].all()


def test_a_mask_that_no_pixel_of_a_small_frame_samples_keeps_the_one_that_it_lies_in(tmp_path):
    dot = np.zeros(PHOTO, bool)
    dot[20, 30] = True
    entry = {"size": list(PHOTO), "counts": rle.encode([dot])[0].decode()}
    empty = {"size": list(PHOTO), "counts": rle.encode([dot & False])[0].decode()}
    masks = reader(tmp_path, [entry, empty])
    assert np.argwhere(rle.decode(masks.rle(1, (4, 6)), (4, 6))).tolist() == [[2, 3]]
    assert not masks.is_empty(1)
    assert masks.rle(2, (4, 6)) is None and masks.is_empty(2)


def test_an_object_of_a_large_file_that_falls_between_the_pixels_of_the_photo(tmp_path):
    """Mask files may be larger than the photo: what no pixel samples has one all the same."""
    for name, place in (("rows", (203, 315)), ("columns", (205, 313)), ("both", (203, 313))):
        dot = np.zeros((400, 600), bool)
        dot[place] = True
        masks = reader(tmp_path / name, [save(tmp_path, dot, f"{name}.png")])
        expected = np.zeros(PHOTO, bool)
        expected[20, 31] = True
        assert masks.rle(1, PHOTO) == rle.encode([expected])[0] and not masks.is_empty(1)
        np.testing.assert_array_equal(masks.window(1, (0, 0, 1, 1), PHOTO), expected)


@pytest.mark.parametrize("form", ["polygons", "compressed", "png"])
def test_thin_objects_stay_in_small_windows_and_frames(tmp_path, form):
    """A stroke of one pixel in a box of 48x36, seen at 4x4 and 5x3: no centre of those is on it."""
    mask = np.zeros(PHOTO, bool)
    mask[8:30, 17] = True
    if form == "polygons":
        entry = [[17.0, 8.0, 18.0, 8.0, 18.0, 30.0, 17.0, 30.0]]
    elif form == "compressed":
        entry = {"size": list(PHOTO), "counts": rle.encode([mask])[0].decode()}
    else:
        entry = save(tmp_path, mask)
    masks = reader(tmp_path, [entry])
    for size in ((4, 4), (5, 3)):
        for box in (BOX, (0.0, 0.0, 1.0, 1.0)):
            found = masks.window(1, box, size)
            assert not at_centres(mask, box, size).any() and found.any()
            for row, column in np.argwhere(mask):  # each pixel lies in one that is marked
                y = ((row + 0.5) / 40 - box[1]) / (box[3] - box[1]) * size[0]
                x = ((column + 0.5) / 60 - box[0]) / (box[2] - box[0]) * size[1]
                assert not (0 <= y < size[0] and 0 <= x < size[1]) or found[int(y), int(x)]
            assert len(set(np.nonzero(found)[1])) == 1
        whole = masks.window(1, (0.0, 0.0, 1.0, 1.0), size)
        np.testing.assert_array_equal(rle.decode(masks.rle(1, size), size), whole)
    # A window beside the object stays empty.
    assert not masks.window(1, (0.5, 0.1, 0.9, 0.8), (4, 4)).any()


def save(tmp_path, array, name="m.png"):
    Image.fromarray(array).save(tmp_path / name)
    return {"png": str(tmp_path / name)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: {"png": str(p / "gone.png")}, "gone.png: No such file"),
        (
            lambda p: save(p, blob(40, 60).astype(np.uint16) * 65535),
            r"m.png: mask of mode I.* \(16 bits\), expected one channel of 1 or 8 bits",
        ),
        (lambda p: save(p, np.zeros((40, 60, 3), np.uint8)), "mask of mode RGB, expected"),
        (lambda p: save(p, ~blob(40, 60)), r"m.png: \d+% of the mask lies outside its box"),
        (
            lambda p: save(p, blob(60, 40)),
            "mask of 60x40 .height x width., expected the shape of the photo, 40x60",
        ),
        (
            lambda p: {"size": [60, 40], "counts": rle.encode([blob(60, 40)])[0].decode()},
            "mask of 60x40",
        ),
        (
            lambda p: {"size": [40, 61], "counts": rle.encode([blob(40, 60)])[0].decode()},
            "mask runs cover 2400 pixels, expected height 40 x width 61",
        ),
        (lambda p: {"size": [40, 60], "counts": "~~"}, "are no compressed COCO run lengths"),
        (lambda p: {"size": [40, 60]}, "expected polygons or size and counts"),
        (lambda p: [[1, 2, 3]], "expected polygons"),
        (lambda p: [[1, 2, 3, 4]], "three or more points"),
        (lambda p: [["x"] * 6], "expected polygons"),
    ],
)
def test_what_is_wrong_with_a_mask_is_told_with_image_and_box(tmp_path, make, message):
    masks = reader(tmp_path, [None, make(tmp_path)])
    for call in (
        lambda: masks.rle(2, PHOTO),
        lambda: masks.window(2, BOX, (8, 8)),
        lambda: masks.is_empty(2),
    ):
        with pytest.raises(MaskError, match=r"image 'im', box 1 \(tree\): .*" + message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_damaged_files_missing_masks_and_sizes(tmp_path):
    whole = save(tmp_path, blob(40, 60))
    data = (tmp_path / "m.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    entries = [{"png": str(tmp_path / name)} for name in ("cut.png", "text.png")]
    masks = reader(tmp_path, [*entries, None, [[0, 0, 9, 0, 9, 9]], whole], size=(0, 0))
    for row, message in (
        (1, "cut.png: no readable mask file"),
        (2, "text.png: no readable image"),
        (3, "no mask"),
        (4, "photo of unknown size"),
    ):
        with pytest.raises(MaskError, match=message):
            masks.window(row, BOX, (8, 8))
    assert masks.window(5, BOX, (8, 8)).any()  # PNG files need no size of the photo


def test_a_set_without_masks_is_refused(tmp_path):
    with DatasetWriter(tmp_path / "set", "test", ["tree"], ["Tree"], None) as writer:
        writer.add_image("im", "i.jpg", PHOTO, [BOX], [0])
    with pytest.raises(UserError, match="set: the dataset has no masks"):
        MaskReader(Dataset.open(tmp_path / "set"))
