"""COCO run-length masks: equal to what the reference library makes of them."""

import re

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from common.masks import rle


def random_masks(seed, count):
    """Masks of all kinds of sizes, some empty, full, or with long runs."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(count):
        height, width = rng.integers(1, 40, 2) if rng.random() < 0.8 else rng.integers(100, 300, 2)
        noise = rng.random((height, width))
        if rng.random() < 0.5:
            noise = np.sort(noise, axis=int(rng.integers(2)))
        masks.append(np.asfortranarray(noise < rng.choice([0, 0.05, 0.5, 1])).astype(np.uint8))
    return masks


def encode(masks):
    counts = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in masks]
    return counts, np.array([mask.shape for mask in masks], np.int32).reshape(-1, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_runs_areas_and_boxes(seed, count):
    masks = random_masks(seed, count)
    counts, sizes = encode(masks)
    runs, offsets, broken = rle.decode_runs(counts)
    for i, mask in enumerate(masks):
        own = runs[offsets[i] : offsets[i + 1]]
        pixels = np.repeat(np.arange(len(own)) % 2, own).reshape(mask.shape, order="F")
        np.testing.assert_array_equal(pixels, mask)
        assert rle.encode_runs(own) == counts[i]
    assert not len(broken) and rle.find_broken(counts, sizes) is None
    assert rle.areas(counts).tolist() == [int(mask.sum()) for mask in masks]
    for mask, box in zip(masks, rle.tight_boxes(counts, sizes).tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        expected = [0, 0, 0, 0]
        if len(rows):
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: (c[:-1] + b"P", s), "no compressed COCO run lengths"),  # goes on, but ends
        (lambda c, s: (b"~~", s), "no compressed COCO run lengths"),
        (lambda c, s: (b"o" * 40 + b"0", s), "no compressed COCO run lengths"),
        (lambda c, s: (c + b"1", s), "cover .* pixels, expected height 7 x width 5 = 35"),
        (lambda c, s: (c, (5, 8)), "cover 35 pixels, expected height 5 x width 8 = 40"),
        (lambda c, s: (b"", s), "cover 0 pixels"),
        (lambda c, s: (c, (0, 5)), "mask of size 0x5"),
        (lambda c, s: (c, (-7, -5)), "mask of size -7x-5"),
    ],
)
def test_what_is_no_mask_is_found(change, message):
    good, size = encode([np.eye(7, 5, dtype=np.uint8)])
    bad, bad_size = change(good[0], size[0])
    found = rle.find_broken([good[0], bad, good[0]], np.array([size[0], bad_size, size[0]]))
    assert found[0] == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[1])


def test_random_bytes_never_crash():
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = [rng.integers(0, 256, rng.integers(0, 30)).astype(np.uint8).tobytes()] * 2
        sizes = rng.integers(-3, 50, (2, 2))
        found = rle.find_broken(counts, sizes)
        assert found is None or (found[0] in (0, 1) and found[1])
        assert len(rle.areas(counts)) == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_pixels_to_counts_and_back(seed):
    masks = random_masks(seed, 6)
    counts, sizes = encode(masks)
    assert rle.encode(masks) == counts  # numbers in Fortran order
    assert rle.encode([np.ascontiguousarray(mask) != 0 for mask in masks]) == counts
    for mask, text in zip(masks, counts, strict=True):
        np.testing.assert_array_equal(rle.decode(text, mask.shape), mask)
    rng = np.random.default_rng(seed)
    margins = rng.integers(0, 4, (len(masks), 2, 2))
    padded = [np.pad(mask, margin) for mask, margin in zip(masks, margins, strict=True)]
    expected, whole = encode(padded)
    assert rle.encode_windows(masks, margins[:, :, 0], whole) == expected
    window = rle.encode_window(masks[0], *margins[0, :, 0], padded[0].shape)
    assert window == expected[0]


def one_size(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    noise = rng.random((rng.integers(1, 6), height, width))
    if rng.random() < 0.5:
        noise = np.sort(noise, axis=int(rng.integers(1, 3)))
    return noise < rng.choice([0.05, 0.3, 0.7, 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_overlaps_unions_and_other_frames(seed):
    masks = one_size(seed)
    size = masks.shape[1:]
    counts = rle.encode(masks)
    assert (rle.decode_all(counts, size) == masks).all()
    inter = (masks[:, None] & masks).sum((2, 3))
    union = (masks[:, None] | masks).sum((2, 3))
    areas = np.broadcast_to(masks.sum((1, 2))[:, None], inter.shape)
    assert np.array_equal(rle.iou(counts, counts, size), inter / np.maximum(union, 1))
    inside = inter / np.maximum(areas, 1)
    assert np.array_equal(rle.iou(counts, counts, size, of_a=True), inside)
    mixed = np.arange(len(masks)) % 2 == 0
    expected = np.where(mixed, inside, inter / np.maximum(union, 1))
    assert np.array_equal(rle.iou(counts, counts, size, of_a=mixed), expected)
    assert rle.merge(counts, size) == rle.encode([masks.any(0)])[0]
    assert rle.merge(counts, size, intersect=True) == rle.encode([masks.all(0)])[0]
    new = tuple(np.random.default_rng(seed).integers(1, 60, 2).tolist())
    rows, columns = ((np.arange(n) + 0.5) * s / n for n, s in zip(new, size, strict=True))
    # Exact quotients of these small numbers are exact in float64 but for thirds and the like.
    rows, columns = (np.floor(x + 1e-9).astype(int) for x in (rows, columns))
    assert rle.resize(counts, size, new) == rle.encode(masks[:, rows][:, :, columns])


def test_nothing_and_what_does_not_fit():
    assert rle.encode([]) == [] and rle.decode_all([], (3, 4)).shape == (0, 3, 4)
    assert rle.iou([], rle.encode([np.ones((3, 4))]), (3, 4)).shape == (0, 1)
    assert rle.resize([], (3, 4), (5, 6)) == []
    with pytest.raises(ValueError, match="window of 3x4 at 0, 1 is not in 3x4"):
        rle.encode_window(np.ones((3, 4), bool), 0, 1, (3, 4))
    with pytest.raises(ValueError, match="no code of 4x4 pixels"):
        rle.decode(rle.encode([np.ones((3, 4), bool)])[0], (4, 4))


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        (rle.encode_runs([1 << 59] * 32 + [12]), (3, 4), "12|no compressed|cover"),
        (b"0" * 1000, (3, 4), "1000 characters of counts, expected at most 91"),
        (b"", (1 << 16, 1 << 16), "65536x65536 pixels, expected at most"),
        (b"", ((1 << 31) - 1, (1 << 31) - 1), "pixels, expected at most"),
    ],
)
def test_masks_that_would_fill_memory_or_overflow_are_broken(counts, size, message):
    broken = rle.find_broken([rle.encode_runs([12]), counts], [(3, 4), size])
    assert broken is not None and broken[0] == 1 and re.search(message, broken[1])
