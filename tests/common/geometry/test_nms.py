"""NMS equals greedy brute force in every case: ties, empty boxes, all thresholds, many classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.geometry import nms
from tests.oracles import nms as oracle

THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
nms_mask = jax.jit(nms.nms_mask)


@jax.jit
def mask_and_top(boxes, scores, valid, threshold, classes):
    """The kept entries as a mask, and the 50 best of them."""
    keep = nms.nms_mask(boxes, scores, valid, threshold, classes)
    return keep, *nms.nms_top(boxes, scores, valid, threshold, 50, classes)


def random_case(seed, count, num_classes, grid):
    """Boxes on a small grid (ties, touching, equal, empty, inverted) or around shared centres."""
    rng = np.random.default_rng(seed)
    if grid:
        boxes = rng.integers(0, 10, (count, 4))
        scores = rng.integers(0, 8, count) / 8
    else:
        centre = rng.uniform(0, 300, (1 + count // 8, 2))[rng.integers(0, 1 + count // 8, count)]
        centre, side = centre + rng.normal(0, 6, (count, 2)), rng.uniform(10, 60, (count, 2))
        boxes = np.concatenate([centre - side / 2, centre + side / 2], 1)
        scores = rng.random(count)
    valid = rng.random(count) < 0.8
    classes = rng.integers(0, num_classes, count).astype(np.int32)
    return boxes.astype(np.float32), scores.astype(np.float32), valid, classes


def assert_equals_greedy(boxes, scores, valid, threshold, classes):
    kept = oracle.greedy(boxes, scores, valid, threshold, classes)
    keep, indices, real = map(np.asarray, mask_and_top(boxes, scores, valid, threshold, classes))
    np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(kept))
    assert indices.shape == real.shape == (50,)
    np.testing.assert_array_equal(indices[real], kept[:50])
    assert not np.any(indices[~real])


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("num_classes", [1, 4, 500])
@pytest.mark.parametrize("grid", [True, False])
def test_equals_greedy_on_random_boxes(threshold, num_classes, grid):
    for seed, count in enumerate((1, 64, 65, 150)):
        boxes, scores, valid, classes = random_case(seed, count, num_classes, grid)
        assert_equals_greedy(boxes, scores, valid, threshold, classes)


# One length for all examples, so that they share a compiled program; `valid` varies the number.
@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.int8, (70, 4), elements=st.integers(-2, 6)),
    hnp.arrays(np.int8, 70, elements=st.integers(-2, 3)),
    hnp.arrays(bool, 70),
    hnp.arrays(np.int32, 70, elements=st.integers(-1, 2)),
    st.sampled_from(THRESHOLDS),
)
def test_equals_greedy_on_adversarial_boxes(boxes, scores, valid, classes, threshold):
    boxes, scores = boxes.astype(np.float32), scores.astype(np.float32)
    assert_equals_greedy(boxes, scores, valid, threshold, classes)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(THRESHOLDS))
def test_order_of_the_input_does_not_matter_without_ties(seed, threshold):
    boxes, _, valid, classes = random_case(seed, 100, 3, True)
    rng = np.random.default_rng(seed)
    scores = rng.permutation(100).astype(np.float32)
    shuffle = rng.permutation(100)
    kept = nms_mask(boxes, scores, valid, threshold, classes)
    shuffled = nms_mask(
        boxes[shuffle], scores[shuffle], valid[shuffle], threshold, classes[shuffle]
    )
    np.testing.assert_array_equal(kept[shuffle], shuffled)


def test_a_chain_of_overlaps_needs_many_rounds_and_stays_exact():
    start = np.arange(300, dtype=np.float32) * 4
    boxes = np.stack([start, np.zeros(300), start + 10, np.full(300, 10)], 1).astype(np.float32)
    scores = np.linspace(1, 0.1, 300, dtype=np.float32)
    for threshold in (0.2, 0.3, 0.5):
        assert_equals_greedy(boxes, scores, np.ones(300, bool), threshold, np.zeros(300, int))


def test_extreme_scores_and_class_numbers():
    boxes = np.tile(np.array([[0, 0, 4, 4]], np.float32), (6, 1))
    scores = np.array([-np.inf, np.inf, 0.0, -0.0, -np.inf, -1e38], np.float32)
    classes = np.array([2**31 - 1, -(2**31), 7, 7, 2**31 - 1, 7], np.int32)
    assert_equals_greedy(boxes, scores, np.array([1, 1, 1, 1, 1, 1], bool), 0.5, classes)
    assert_equals_greedy(boxes, scores, np.array([0, 1, 0, 1, 1, 1], bool), 0.5, classes)


def test_no_entries_and_no_valid_entries():
    assert nms.nms_mask(jnp.zeros((0, 4)), jnp.zeros(0), jnp.zeros(0, bool), 0.5).shape == (0,)
    boxes, scores, _, classes = random_case(0, 90, 3, False)
    nothing = np.zeros(90, bool)
    keep, _, real = mask_and_top(boxes, scores, nothing, 0.5, classes)
    assert not keep.any() and not real.any()


def test_vmap_equals_one_image_at_a_time():
    cases = [random_case(seed, 150, 5, seed % 2 == 0) for seed in range(4)]
    batch = [np.stack(column) for column in zip(*cases, strict=True)]
    batched = jax.jit(jax.vmap(nms.nms_mask, (0, 0, 0, None, 0)))(*batch[:3], 0.5, batch[3])
    for kept, (boxes, scores, valid, classes) in zip(batched, cases, strict=True):
        expected = oracle.greedy(boxes, scores, valid, 0.5, classes)
        np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(expected))


@functools.partial(jax.jit, static_argnames=("max_candidates", "max_detections"))
def detect(boxes, scores, valid, max_candidates=400, max_detections=30):
    return nms.multiclass_nms(
        boxes,
        scores,
        valid,
        score_threshold=0.2,
        iou_threshold=0.5,
        max_candidates=max_candidates,
        max_detections=max_detections,
    )


def assert_detections(found, expected):
    count = len(expected)
    np.testing.assert_array_equal(found["valid"], np.arange(len(found["valid"])) < count)
    np.testing.assert_array_equal(found["scores"][:count], [score for score, _, _ in expected])
    np.testing.assert_array_equal(found["classes"][:count], [c for _, c, _ in expected])
    np.testing.assert_array_equal(found["boxes"][:count], np.array([b for *_, b in expected]))
    for name in ("scores", "classes", "boxes"):
        assert not np.any(found[name][count:])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_multiclass_equals_nms_of_each_class(shared, ties):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes = random_case(seed, 40 * 6, 1, ties)[0].reshape(40, 6, 4)[:, : 1 if shared else 6]
        scores = rng.integers(0, 9, (40, 6)) / 8 if ties else rng.random((40, 6))
        scores, valid = scores.astype(np.float32), rng.random(40) < 0.9
        expected = oracle.multiclass(boxes, scores, valid, 0.2, 0.5, 30)
        assert_detections(detect(boxes, scores, valid), expected)


def test_multiclass_is_exact_with_few_candidates_as_long_as_the_output_is_full():
    rng = np.random.default_rng(0)
    boxes = random_case(0, 60 * 5, 1, False)[0].reshape(60, 5, 4)
    scores, valid = rng.random((60, 5)).astype(np.float32), np.ones(60, bool)
    found = detect(boxes, scores, valid, max_candidates=60, max_detections=20)
    assert found["valid"].all()
    assert_detections(found, oracle.multiclass(boxes, scores, valid, 0.2, 0.5, 20))


def test_equals_torchvision():
    torch = pytest.importorskip("torch", reason="optional peer")
    torchvision = pytest.importorskip("torchvision", reason="optional peer")
    for seed in range(5):
        boxes, _, _, classes = random_case(seed, 500, 20, False)
        scores = np.random.default_rng(seed).permutation(500).astype(np.float32)
        theirs = torchvision.ops.batched_nms(
            *(torch.from_numpy(array) for array in (boxes, scores, classes)), 0.5
        )
        ours = nms_mask(boxes, scores, np.ones(500, bool), 0.5, classes)
        np.testing.assert_array_equal(np.flatnonzero(ours), np.sort(theirs.numpy()))


@pytest.mark.parametrize("tile", [1, 7, 100, 1024])
def test_the_result_does_not_depend_on_the_tile(tile):
    boxes, scores, valid, classes = random_case(3, 150, 4, grid=False)
    keep = jax.jit(functools.partial(nms.nms_mask, tile=tile))(boxes, scores, valid, 0.5, classes)
    kept = oracle.greedy(boxes, scores, valid, 0.5, classes)
    np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(kept))
