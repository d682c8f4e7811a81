"""Photos of any make land on the canvas where their boxes say they do."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.data import images, placement

CANVAS = (60, 100)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """A colourful picture without fine detail."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def drawn(data: bytes, geometry=None, shape=CANVAS, **fit_options) -> np.ndarray:
    photo = images.open_photo(data)
    geometry = geometry or placement.fit(photo.size, shape, **fit_options)
    return placement.draw(photo, geometry, shape)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_canvas_is_padded_up_to_the_multiple():
    assert images.canvas_shape((800, 1333), 32) == (800, 1344)
    assert images.canvas_shape((384, 384), 32) == (384, 384)


@pytest.mark.parametrize(
    "size, content",
    [
        ((768, 1024), (800, 1067)),  # short side 800
        ((500, 1000), (667, 1333)),  # long side limited
        ((1024, 768), (800, 600)),  # portrait: limited by the canvas height
        ((1, 1), (800, 800)),
        ((100, 20000), (7, 1333)),
        ((1, 20000), (1, 1333)),  # never thinner than a pixel
        ((20000, 3), (800, 1)),
    ],
)
def test_photos_fit_the_canvas_and_keep_their_aspect(size, content):
    assert placement.fit(size, (800, 1333)).content == content


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.floats(0.1, 3.0),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_content_is_inside_canvas_and_photo_and_boxes_inside_content(size, scale, crop, flip):
    geometry = placement.fit(size, (80, 133), scale=scale, crop=crop, flip=flip)
    for axis in (0, 1):
        assert 1 <= geometry.content[axis] <= (80, 133)[axis]
        end = geometry.offset[axis] + geometry.content[axis]
        assert 0 <= geometry.offset[axis] and end <= geometry.full[axis]
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((2, 50, 2)), axis=0)
    boxes = np.concatenate([corners[0], corners[1]], axis=1).astype(np.float32)
    moved, keep = placement.transform_boxes(boxes, geometry)
    height, width = geometry.content
    assert (moved >= 0).all() and (moved <= [width, height, width, height]).all()
    assert (moved[keep, 2:] > moved[keep, :2]).all()
    if scale <= 1:
        assert keep.all()


def test_boxes_use_the_exact_scale_of_each_axis():
    geometry = placement.fit((333, 500), (800, 1333))  # 800 x 1201: scales 2.4024, 2.402
    boxes, keep = placement.transform_boxes(np.float32([[0.1, 0.2, 0.5, 1.0]]), geometry)
    np.testing.assert_allclose(boxes, [[120.1, 160.0, 600.5, 800.0]], rtol=1e-6)
    mirrored = placement.fit((333, 500), (800, 1333), flip=True)
    boxes, _ = placement.transform_boxes(np.float32([[0.1, 0.2, 0.5, 1.0]]), mirrored)
    np.testing.assert_allclose(boxes, [[600.5, 160.0, 1080.9, 800.0]], rtol=1e-6)
    assert keep.all()


def test_a_box_of_which_a_crop_leaves_little_is_dropped():
    geometry = placement.fit((100, 100), (100, 100), scale=2.0, crop=(0.0, 0.0))  # upper left
    boxes = np.float32([[0, 0, 0.5, 0.5], [0.48, 0, 1, 0.5], [0.6, 0.6, 1, 1], [0.1, 0.1, 1, 0.5]])
    moved, keep = placement.transform_boxes(boxes, geometry)
    assert keep.tolist() == [True, False, False, True]
    np.testing.assert_allclose(moved[3], [20, 20, 100, 100])


def test_box_without_area_is_dropped():
    geometry = placement.fit((100, 100), (100, 100))
    _, keep = placement.transform_boxes(np.float32([[0.5, 0.1, 0.5, 0.9]]), geometry)
    assert not keep[0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale, crop", [(1.0, (0, 0)), (0.6, (0, 0)), (1.7, (0.2, 0.9))])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_frame_their_object_in_the_pixels(orientation, flip, scale, crop):
    """A white rectangle is where its box says, through EXIF, resize, crop, flip and padding."""
    height, width = 120, 150  # as displayed
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[30:81, 60:111] = 255
    box = np.float32([[60 / width, 30 / height, 111 / width, 81 / height]])
    shown = Image.fromarray(pixels)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it so
    stored = shown if orientation == 1 else shown.transpose(undo[orientation])
    photo = images.open_photo(encode(stored, "PNG", exif=exif(orientation)))
    assert photo.size == (height, width)
    geometry = placement.fit(photo.size, (100, 120), scale=scale, crop=crop, flip=flip)
    canvas = placement.draw(photo, geometry, (128, 128))
    rows, columns = np.nonzero(canvas[..., 0] >= 128)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    boxes, keep = placement.transform_boxes(box, geometry)
    assert keep[0]
    np.testing.assert_allclose(boxes[0], found, atol=0.75)
    assert not canvas[geometry.content[0] :].any() and not canvas[:, geometry.content[1] :].any()


def test_exif_is_not_applied_when_the_annotations_have_the_stored_shape():
    data = encode(smooth(40, 80), "JPEG", exif=exif(6))  # stored 40 x 80, displayed 80 x 40
    assert images.open_photo(data).size == (80, 40)
    assert images.open_photo(data, (80, 40)).size == (80, 40)
    assert images.open_photo(data, (160, 80)).size == (80, 40)  # annotated on an enlarged copy
    assert images.open_photo(data, (40, 80)).size == (40, 80)


def test_flip_of_the_picture_is_the_mirror_image():
    data = encode(smooth(50, 70))
    plain, mirrored = drawn(data), drawn(data, flip=True)
    width = placement.fit((50, 70), CANVAS).content[1]
    np.testing.assert_array_equal(mirrored[:, :width], plain[:, :width][:, ::-1])


def test_crop_shows_the_part_of_the_enlarged_photo():
    data = encode(smooth(90, 120))
    geometry = placement.fit((90, 120), (60, 80), scale=1.5, crop=(0.99, 0.4))
    whole = placement.Geometry(geometry.full, (0, 0), geometry.full, False)
    (top, left), (height, width) = geometry.offset, geometry.content
    expected = drawn(data, whole, geometry.full)[top : top + height, left : left + width]
    found = drawn(data, geometry, (60, 80))[:height, :width]
    # The antialiasing filter ends at the edge of the crop.
    np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2].astype(float), atol=2)


@pytest.mark.parametrize("size", [(1200, 1601), (603, 899), (4001, 300)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_of_large_jpegs_stays_close_to_the_full_one(size, orientation):
    picture = smooth(*size)
    jpeg = encode(picture, "JPEG", quality=95, exif=exif(orientation))
    full = encode(Image.open(io.BytesIO(jpeg)).convert("RGB"), "PNG", exif=exif(orientation))
    difference = np.abs(drawn(jpeg).astype(int) - drawn(full).astype(int))
    assert difference.max() <= 12 and difference.mean() < 1


def test_resize_averages_instead_of_sampling():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    canvas = drawn(encode(Image.fromarray(stripes)), shape=(16, 16))
    assert np.abs(canvas[:, 1:-1].astype(int) - 128).max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "RGB"])
def test_png_modes_give_the_same_picture(mode):
    grey = Image.fromarray((np.indices((60, 100)).sum(0) % 2 * 255).astype(np.uint8))
    canvas = drawn(encode(grey.convert(mode)))
    np.testing.assert_array_equal(canvas, np.asarray(grey.convert("RGB")))


def test_palette_with_transparency_decodes_without_warning():
    picture = smooth(60, 100).convert("P", palette=Image.Palette.ADAPTIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = drawn(encode(picture, transparency=bytes(range(256))))
    np.testing.assert_array_equal(canvas, np.asarray(picture.convert("RGB")))


def test_16_bit_png_keeps_its_high_bytes():
    values = np.linspace(0, 65535, 6000).reshape(60, 100).astype(np.uint16)
    canvas = drawn(encode(Image.fromarray(values)))
    np.testing.assert_array_equal(canvas, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_cmyk_and_greyscale_jpeg():
    picture = smooth(60, 100)
    cmyk = drawn(encode(picture.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.asarray(picture)).mean() < 6
    grey = drawn(encode(picture.convert("L"), "JPEG", quality=95))
    assert np.abs(grey.astype(int) - np.asarray(picture.convert("L"))[..., None]).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (2, 20000), (20000, 2), (300, 20000)])
def test_extreme_shapes(size):
    canvas = drawn(encode(Image.new("RGB", size[::-1], (10, 200, 30)), "JPEG", quality=95))
    height, width = placement.fit(size, CANVAS).content
    assert np.abs(canvas[:height, :width].astype(int) - [10, 200, 30]).max() <= 3
    assert canvas[height:].sum() + canvas[:, width:].sum() == 0


def test_damaged_photos_are_told_with_a_reason():
    jpeg = encode(smooth(300, 400), "JPEG", quality=95)
    png = encode(smooth(300, 400))
    for data, reason in (
        (b"", "empty file"),
        (b"<html>404</html>", "no readable image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (jpeg[:-2], "truncated"),
        (jpeg[:30], "no readable image"),
        (png[: len(png) // 2], "truncated"),
    ):
        with pytest.raises(images.ImageError, match=reason) as caught:
            drawn(data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(100_000, 100_000), (1, 1 << 29), (1 << 29, 1)])
def test_decompression_bomb_is_refused_by_its_header(size):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    with pytest.raises(images.ImageError, match="{}x{}".format(*size)):
        images.open_photo(data)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "PPM", "ICO", "TGA"])
def test_formats_that_no_photo_has_stay_closed(kind):
    data = encode(Image.new("RGB", (32, 32), (10, 200, 30)), kind)
    with pytest.raises(images.ImageError, match="no readable image"):
        images.open_photo(data)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "GIF", "MPO"])
def test_other_formats_of_photos_are_read(kind):
    canvas = drawn(encode(Image.new("RGB", CANVAS[::-1], (10, 200, 30)), kind))
    assert np.abs(canvas.astype(int) - [10, 200, 30]).max() <= 5


def test_damaged_exif_does_not_spoil_a_good_photo():
    data = encode(smooth(40, 80), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert images.open_photo(data).size == (40, 80)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(images.ImageError, match="No such file"):
        images.read_file(str(tmp_path / "none.jpg"))


def test_a_folder_for_a_photo_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(images.ImageError, match="directory"):
            images.read_file(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_for_a_photo_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(images.ImageError, match="not a regular file"):
        images.read_file(str(tmp_path / "pipe.jpg"))
