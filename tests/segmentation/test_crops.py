"""Sizes of crops, canvases, and that pixels and masks come from where the geometry says."""

import io

import numpy as np
import pytest
from PIL import Image

from common.data import images
from common.io.errors import UserError
from segmentation.crops import windows
from tests.segmentation import coded_photos as coded

SIZE = (80, 120)  # of the photo, height and width


def content(size, *sides, draws=None):
    sides = np.array(sides, float)
    return size.content(sides, np.zeros(len(sides)) if draws is None else draws)


def test_short_side_is_drawn_and_the_long_side_is_limited():
    size = coded.size(short=(200, 300), long=600)
    sides = [(10, 10), (10, 20), (40, 10), (5, 60)]
    assert content(size, *sides).tolist() == [[200, 200], [200, 400], [600, 150], [50, 600]]
    assert content(size, (10, 20), draws=np.array([0.5])).tolist() == [[250, 500]]
    assert content(size, (1, 5000)).tolist() == [[1, 600]]


def test_fixed_size_ignores_the_aspect():
    assert content(coded.size(fixed=(112, 96)), (3, 4), (90, 1)).tolist() == [[112, 96]] * 2


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (dict(), "short: found None, expected a size in pixels, or None beside fixed None"),
        (dict(short=(2, 3), long=4, fixed=(1, 1)), "or None beside fixed (1, 1)"),
        (dict(short=(30, 20), long=40), "expected 1 <= min <= max"),
        (dict(short=30, long=20), "long: found 20.0, expected at least short, 30"),
        (dict(fixed=(0, 5)), "fixed: found (0, 5), expected height, width"),
    ],
)
def test_impossible_sizes_are_refused_by_name(fields, found):
    with pytest.raises(UserError) as error:
        coded.size(**fields)
    assert found in str(error.value) and str(error.value).startswith("config.data.crop.")


def test_the_smallest_canvas_that_holds_the_content_is_chosen():
    canvases = np.array([(64, 64), (32, 96), (96, 32), (96, 96)])
    sizes = np.random.default_rng(0).integers(1, 96, (200, 2))
    for (height, width), choice in zip(sizes, windows.choose_canvas(sizes, canvases), strict=True):
        holding = [c for c in canvases.tolist() if c[0] >= height and c[1] >= width]
        assert canvases[choice].prod() == min(h * w for h, w in holding)
    # None holds these: the one in which they stay largest, and there they fit.
    sizes = np.array([[40, 200], [300, 20]])
    choice = windows.choose_canvas(sizes, canvases)
    assert canvases[choice].tolist() == [[32, 96], [96, 32]]
    assert windows.shrink(sizes, canvases[choice]).tolist() == [[19, 96], [96, 6]]


def decoded(image: np.ndarray, size=SIZE):
    """x, y in pixels of the photo that each pixel of a crop shows."""
    return image[..., 0] / 255 * size[1], image[..., 1] / 255 * size[0]


def cut(planned, row=0, size=SIZE, **options):
    photo = images.open_photo(png(coded.photo(size)))
    part = planned.cut(row, size, **options)
    return part, part.image(images.decode(photo, part.photo_size))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.7])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(50, 70), (21, 21), (90, 30)])  # enlarged, reduced, stretched
def test_every_pixel_shows_its_place_in_the_photo(angle, flip, shape):
    centre, sides = np.array([66.0, 37.0]), np.array([30.0, 44.0])
    window = windows.Windows(
        centre[None], sides[None], np.array([angle]), np.array([flip]), np.array([shape])
    )
    _, image = cut(window)
    assert image.shape == (*shape, 3)
    found_x, found_y = decoded(image.astype(float))
    for i, j in np.random.default_rng(0).integers([2, 2], np.array(shape) - 2, (40, 2)):
        y, x = (
            (i + 0.5 - shape[0] / 2) * sides[0] / shape[0],
            (j + 0.5 - shape[1] / 2) * sides[1] / shape[1],
        )
        x = -x if flip else x
        turned = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
        assert abs(found_x[i, j] - centre[0] - turned[0]) < 1.0
        assert abs(found_y[i, j] - centre[1] - turned[1]) < 1.0


def test_pixels_beyond_the_photo_are_marked():
    window = windows.Windows(
        np.array([[15.0, 40.0]]), np.array([[60.0, 30.0]]), np.array([0.6]), np.array([False]),
        np.array([[60, 30]]),
    )  # fmt: skip
    part, image = cut(window)
    inside = part.inside()
    assert 0.7 < inside.mean() < 0.95
    assert (image[~inside] == (124, 116, 104)).all()
    y, x = np.mgrid[:60, :30] + 0.5
    photo_x = 15 + np.cos(0.6) * (x - 15) - np.sin(0.6) * (y - 30)
    sure = abs(photo_x) > 1
    np.testing.assert_array_equal(inside[sure], (photo_x > 0)[sure])


def augmented(box, draws, jitter=0.1, deviation=0.0, size=None, moved=True):
    size = size or coded.size(short=(24, 36), long=72)
    how = windows.Augmentation(size, jitter, flip=True)
    count = len(draws)
    return how.windows(
        np.tile(box, (count, 1)), np.tile(SIZE, (count, 1)), np.full(count, moved),
        np.full(count, deviation), draws,
    )  # fmt: skip


def test_each_side_of_a_box_moves_by_up_to_a_tenth_of_its_length():
    box = np.array([0.4, 0.3, 0.7, 0.7])
    draws = np.random.default_rng(0).random((2000, 8))
    windows = augmented(box, draws)
    half = windows.sides[:, ::-1] / 2
    sides = np.concatenate([windows.centre - half, windows.centre + half], axis=1)
    length = np.array([0.3 * SIZE[1], 0.4 * SIZE[0]] * 2)
    moves = (sides - box * np.array([SIZE[1], SIZE[0]] * 2)) / length
    assert np.abs(moves).max() <= 0.1 + 1e-9
    assert (moves.min(0) < -0.095).all() and (moves.max(0) > 0.095).all()
    assert np.abs(np.corrcoef(moves.T) - np.eye(4)).max() < 0.1
    assert 0.45 < windows.flip.mean() < 0.55
    assert windows.content.min() >= 24 and windows.content.min(1).max() >= 35
    still = augmented(box, draws, moved=False)
    np.testing.assert_allclose(still.centre, np.tile(box[:2] + box[2:], (2000, 1)) / 2 * SIZE[::-1])


def test_boxes_at_the_border_stay_inside_the_photo():
    windows = augmented(np.array([0.0, 0.5, 0.4, 1.2]), np.random.default_rng(0).random((500, 8)))
    half = windows.sides[:, ::-1] / 2
    assert (windows.centre - half >= -1e-9).all()
    assert (windows.centre + half <= np.array(SIZE[::-1]) + 1e-9).all()


def test_angles_are_normal_within_three_deviations():
    draws = np.random.default_rng(0).random((20000, 8))
    angle = augmented(np.array([0.2, 0.2, 0.8, 0.4]), draws, deviation=0.2).angle
    assert abs(angle.mean()) < 0.01 and abs(angle.std() - 0.2) < 0.01
    assert np.abs(angle).max() <= 0.6 + 1e-9


def test_a_turned_window_holds_the_object_as_a_box_would():
    """An ellipse that fills its box fills the turned window from side to side, too."""
    box = np.array([0.3, 0.4, 0.7, 0.55])
    windows = augmented(box, np.random.default_rng(1).random((20, 8)), jitter=0.0, deviation=0.5)
    for row in range(20):
        part, image = cut(windows, row)
        x, y = decoded(image.astype(float))
        mask = coded.in_ellipse(box, x / SIZE[1], y / SIZE[0]) & part.inside()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert max(rows[0], columns[0]) <= 3
        assert len(mask) - rows[-1] <= 4 and mask.shape[1] - columns[-1] <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_turned_photos_are_those_of_the_photo_as_displayed(orientation):
    shown = np.repeat(np.repeat(coded.photo((16, 24)), 4, 0), 4, 1)
    stored = Image.fromarray(shown)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's operation, displayed to stored
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    photo = images.open_photo(file.getvalue())
    assert photo.size == (64, 96)
    window = (0.25, 0.125, 0.75, 0.5)
    found = images.resample(images.decode(photo, (64, 96)), window, (24, 48))
    np.testing.assert_array_equal(np.asarray(found), shown[8:32, 24:72])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_a_part_of_a_jpeg_is_decoded_as_the_whole_is(orientation, mode, reduction):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    shown = Image.fromarray(noise).resize((515, 389), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    shown.save(file, "jpeg", quality=90, exif=exif)
    data = file.getvalue()
    height, width = images.open_photo(data).size
    window = (0.31, 0.42, 0.67, 0.81)
    size = (int(height * 0.39 / reduction), int(width * 0.36 / reduction))
    full = (size[0] / 0.39, size[1] / 0.36)
    part = images.decode(images.open_photo(data), full, window)
    whole = images.decode(images.open_photo(data), full)
    # The whole is drawn with the decoder's reduction, so is the part.
    assert part.extent == whole.extent
    assert min(part.origin) > 0 and np.prod(part.image.size) < 0.6 * np.prod(whole.image.size)
    found, expected = (
        np.asarray(images.resample(p, window, size)).astype(int) for p in (part, whole)
    )
    assert np.abs(found - expected).max() <= 1


def test_a_broken_jpeg_is_named_whatever_part_is_wanted():
    file = io.BytesIO()
    Image.fromarray(coded.photo((300, 300))).save(file, "jpeg")
    photo = images.open_photo(file.getvalue()[:-400])
    with pytest.raises(images.ImageError, match="truncated"):
        images.decode(photo, (300, 300), (0.5, 0.8, 0.7, 1.0))
