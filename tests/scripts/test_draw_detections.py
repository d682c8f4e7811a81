"""Pictures: boxes land where they belong on the photo, and wrong input is told in one line."""

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from common.masks.dataset_masks import MaskReader
from common.report import panels, photo_drawing
from common.tables import DetectionsWriter
from scripts import draw_detections as draw

GREY = (90, 90, 90)


@pytest.fixture
def dataset(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (200, 100), GREY).save(photos / "wide.png")
    Image.new("L", (60, 120), 90).save(photos / "tall.png")
    Image.new("RGB", (50, 50), GREY).save(photos / "other.png")
    with DatasetWriter(
        tmp_path / "dataset", "test", ["/m/cat", "/m/dog"], ["Cat", "Dog"], None, str(photos)
    ) as writer:
        writer.add_image("wide", "wide.png", (100, 200), [[0.25, 0.2, 0.75, 0.8]], [0])
        writer.add_image(
            "folder/tall", "tall.png", (120, 60), [[0, 0, 1, 0.5], [0.5, 0.5, 1, 1]], [0, 1]
        )
        writer.add_image("other", "other.png", (50, 50))
        writer.add_split("validation", [0, 1])
        writer.add_split("test", [2])
        writer.add_split("empty", [])
    return Dataset.open(tmp_path / "dataset")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "x.parquet"
    with DetectionsWriter(path, {"model": "test"}) as writer:
        boxes = np.array([[0.25, 0.25, 0.5, 0.75], [0.6, 0.1, 0.9, 0.9]], np.float32)
        writer.add("wide", ["/m/dog", "/m/cat"], np.array([0.9, 0.3], np.float32), boxes)
        writer.add("folder/tall", [], np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    return path


def pixels_of(picture, colour) -> tuple[int, int, int, int]:
    """xmin, ymin, xmax, ymax (half-open) of the pixels of one colour."""
    y, x = np.nonzero((np.asarray(picture) == colour).all(-1))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_a_box_is_drawn_at_its_share_of_the_photo():
    photo = Image.new("RGB", (200, 100), GREY)
    red = (255, 0, 0)
    drawing = photo_drawing.Drawing(np.array([[0.25, 0.2, 0.75, 0.8]]), [red], [""])
    panel = photo_drawing.draw_boxes(photo, drawing)
    assert pixels_of(panel, red) == pytest.approx((50, 20, 150, 80), abs=1)
    assert panel.getpixel((100, 50)) == GREY  # an outline, the object stays visible
    assert pixels_of(photo, GREY) == (0, 0, 200, 100)  # the photo itself is untouched


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [-0.01, -0.01, 1.01, 1.01]])
def test_a_box_at_the_border_stays_visible(box):
    red = (255, 0, 0)
    drawing = photo_drawing.Drawing(np.array([box]), [red], ["Cat 1"])
    panel = photo_drawing.draw_boxes(Image.new("RGB", (80, 40), GREY), drawing)
    assert pixels_of(panel, red) == (0, 0, 80, 40)


def test_a_mask_is_tinted_inside_and_solid_along_its_outline():
    mask = np.zeros((50, 100), bool)  # half the photo's resolution
    mask[10:40, 25:75] = True
    red = (255, 0, 0)
    drawing = photo_drawing.Drawing(np.array([[0.25, 0.2, 0.75, 0.8]]), [red], [""], [mask])
    panel = photo_drawing.fill_masks(Image.new("RGB", (200, 100), GREY), drawing)
    assert panel.getpixel((50, 20)) == red and panel.getpixel((149, 79)) == red
    tinted = panel.getpixel((100, 50))
    assert GREY[0] < tinted[0] < 255 and 0 < tinted[1] < GREY[1]
    assert panel.getpixel((49, 50)) == GREY and panel.getpixel((100, 80)) == GREY


def test_masks_of_truth_and_table_are_drawn_where_they_are(tmp_path):
    Image.new("RGB", (60, 40), GREY).save(tmp_path / "photo.png")
    truth = np.zeros((40, 60), bool)
    truth[5:20, 10:30] = True
    boxes = np.array([[10 / 60, 5 / 40, 30 / 60, 20 / 40]], np.float32)
    counts = rle.encode([truth])
    entry = {"size": [40, 60], "counts": counts[0].decode()}
    with DatasetWriter(
        tmp_path / "dataset", "test", ["/m/cat"], ["Cat"], None, str(tmp_path), has_masks=True
    ) as writer:
        writer.add_image("photo", "photo.png", (40, 60), boxes, [0], masks=[entry])
        writer.add_split("validation", [0])
    path = tmp_path / "x.parquet"
    with DetectionsWriter(path, {"model": "test"}, masks=True) as writer:
        writer.add(
            "photo", ["/m/cat"], np.float32([0.9]), boxes, counts, np.array([[40, 60]], np.int32)
        )
    dataset = Dataset.open(tmp_path / "dataset")
    drawings = panels.read_drawings(path, dataset, [0], 0.4, 100)
    assert np.array_equal(drawings[0].masks[0], truth)
    drawn = panels.ground_truth(dataset, 0, MaskReader(dataset), (80, 120))
    assert np.array_equal(drawn.masks[0], truth.repeat(2, 0).repeat(2, 1))


def test_classes_have_different_bright_colours():
    colours = [photo_drawing.class_colour(index) for index in range(20)]
    assert len(set(colours)) == 20
    assert min(max(colour) for colour in colours) > 200


def test_pictures_show_truth_and_confident_detections(dataset, table, tmp_path):
    images = panels.choose_images(dataset, "validation", [], 8)
    assert [dataset.image_id(i) for i in images] == ["folder/tall", "wide"]  # most classes first
    drawings = panels.read_drawings(table, dataset, images, min_score=0.4, max_boxes=100)
    found = drawings[0]
    assert found.boxes.tolist() == [[0.25, 0.25, 0.5, 0.75]] and found.texts == ["Dog 0.90"]
    paths = draw.draw_split(dataset, images, drawings, tmp_path / "pictures", side=400)
    assert [path.name for path in paths] == ["folder_tall.jpg", "wide.jpg", "overview.jpg"]
    with Image.open(tmp_path / "pictures/wide.jpg") as picture:
        assert picture.size == (2 * 400 + panels.GAP, 200 + panels.CAPTION)
        right = np.asarray(picture)[panels.CAPTION :, 400 + panels.GAP :].astype(int)
    changed = np.abs(right - GREY).max(-1) > 60
    assert changed[50:150, 98:102].any() and changed[50:150, 198:202].any()  # the dog's sides
    assert not changed[20:180, 300:].any()  # the cat scored less


def test_photos_are_drawn_in_the_order_asked_for(dataset):
    chosen = panels.choose_images(dataset, "validation", ["wide", "folder/tall"], 8)
    assert [dataset.image_id(i) for i in chosen] == ["wide", "folder/tall"]
    assert panels.choose_images(dataset, "empty", [], 8) == []


@pytest.mark.parametrize("image_id", ["other", "nothing"])
def test_a_photo_of_another_split_is_refused(dataset, image_id):
    with pytest.raises(UserError, match=f"'{image_id}' is not in split 'validation'"):
        panels.choose_images(dataset, "validation", [image_id], 8)


def test_a_table_that_does_not_cover_the_photo_is_refused(dataset, table):
    with pytest.raises(UserError, match="'other' is not covered"):
        panels.read_drawings(table, dataset, [2], 0.4, 100)


def test_a_missing_photo_is_named(dataset, tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg: cannot read this photo"):
        photo_drawing.open_photo(str(tmp_path / "nowhere.jpg"), (0, 0), 100)


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert photo_drawing.open_photo(str(tmp_path / "turned.jpg"), (0, 0), 80).size == (40, 80)
