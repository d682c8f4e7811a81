"""Assignment equals its brute-force twin; sampling keeps its promises for any counts."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.assign.matching import ignored, ignored_background, match, matched_idx, sample
from tests.oracles import matching as oracle


def random_boxes(rng, count, size=64):
    # Whole numbers make ties and equal boxes common.
    start = rng.integers(0, size, (count, 2))
    return np.concatenate([start, start + rng.integers(0, 24, (count, 2))], -1).astype(np.float32)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("best_match_iou", [None, 0.3])
def test_match_equals_brute_force(seed, best_match_iou):
    rng = np.random.default_rng(seed)
    boxes, gt_boxes = random_boxes(rng, 40), random_boxes(rng, 6)
    boxes[:4] = gt_boxes[:4]
    valid, gt_valid = rng.random(40) < 0.9, rng.random(6) < 0.7
    ignore = rng.random(40) < 0.3 if seed % 2 else None
    found = match(
        boxes,
        valid,
        gt_boxes,
        gt_valid,
        positive_iou=0.7,
        negative_iou=0.3,
        best_match_iou=best_match_iou,
        ignore=ignore,
    )
    index, positive, negative = oracle.match(
        boxes, valid, gt_boxes, gt_valid, 0.7, 0.3, best_match_iou, ignore
    )
    np.testing.assert_array_equal(found.positive, positive)
    np.testing.assert_array_equal(found.negative, negative)
    rows = np.flatnonzero(positive)
    indices = matched_idx(boxes, gt_boxes, gt_valid)
    np.testing.assert_array_equal(np.asarray(indices)[rows], np.asarray(index)[rows])


@pytest.mark.parametrize("seed", range(20))
def test_ignored_boxes_equal_brute_force_for_each_image_of_a_batch(seed):
    rng = np.random.default_rng(seed)
    boxes = np.stack([random_boxes(rng, 40) for _ in range(3)])
    regions = np.stack([random_boxes(rng, 5) for _ in range(3)])
    region_valid = rng.random((3, 5)) < 0.7
    region_valid[2] = False
    batch = {"image_valid": np.ones(3, bool), "ignore_boxes": regions, "ignore_valid": region_valid}
    expected = [
        oracle.ignored(*image, 0.5) for image in zip(boxes, regions, region_valid, strict=True)
    ]
    np.testing.assert_array_equal(ignored_background(boxes, batch, 0.5), expected)
    np.testing.assert_array_equal(ignored(boxes, regions, region_valid, 0.5), expected)
    # Anchors are the same for all images.
    expected = [
        oracle.ignored(boxes[0], *image, 0.5) for image in zip(regions, region_valid, strict=True)
    ]
    np.testing.assert_array_equal(ignored_background(boxes[0], batch, 0.5), expected)
    batch["ignore_valid"] = np.zeros((3, 5), bool)
    assert not ignored_background(boxes, batch, 0.5).any()


def test_image_without_objects_has_only_negatives():
    boxes = random_boxes(np.random.default_rng(0), 10)
    found = match(
        boxes,
        np.ones(10, bool),
        np.zeros((3, 4), np.float32),
        np.zeros(3, bool),
        positive_iou=0.5,
        negative_iou=0.5,
        best_match_iou=0.3,
    )
    assert not found.positive.any() and found.negative.all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num_positive=st.integers(0, 40),
    num_negative=st.integers(0, 40),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_sample_fills_slots_from_the_right_pools(seed, num_positive, num_negative, fraction):
    rng = np.random.default_rng(seed)
    kind = np.zeros(80, int)
    chosen = rng.permutation(80)
    kind[chosen[:num_positive]] = 1
    kind[chosen[num_positive : num_positive + num_negative]] = 2
    index, positive, valid = map(
        np.asarray, sample(jax.random.key(seed), kind == 1, kind == 2, 16, fraction)
    )
    used = index[valid]
    assert len(set(used)) == len(used), "a box is drawn at most once"
    expected_positive = min(num_positive, max(1, int(16 * fraction)))
    assert positive.sum() == expected_positive
    assert valid.sum() == expected_positive + min(num_negative, 16 - expected_positive)
    assert (kind[index[valid & positive]] == 1).all()
    assert (kind[index[valid & ~positive]] == 2).all()


def test_sample_is_uniform():
    draws = jax.vmap(lambda k: sample(k, np.arange(20) < 10, np.arange(20) >= 10, 8, 0.5)[0])(
        jax.random.split(jax.random.key(1), 4000)
    )
    share = np.bincount(np.asarray(draws).ravel(), minlength=20) / 4000
    np.testing.assert_allclose(share, 0.4, atol=0.04)
