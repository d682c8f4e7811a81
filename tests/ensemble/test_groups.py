"""Operators over flat rows equal one brute-force call a group, whatever the sizes and the order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.operators import Nms, SoftNms, Voting, WeightedBoxesFusion, groups
from ensemble.operators.groups import Rows, apply_operator
from tests.oracles import ensembling as twin

WEIGHTS = (1.0, 2.0, 1.0)
PAIRS = {
    Nms(): lambda b, s, m: twin.nms(b, s, 0.5),
    SoftNms(min_score=0.2): lambda b, s, m: twin.soft_nms(b, s, "gaussian", 0.5, None, 0.2),
    Voting(): lambda b, s, m: twin.voting(b, s, 0.5, 4, 0.05, 0.3, "mean", 0.5),
    WeightedBoxesFusion(WEIGHTS, conf_type="absent_model_aware_avg"): lambda b, s, m: twin.wbf(
        b, s, m, WEIGHTS, 0.55, "absent_model_aware_avg"
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What the tests need; the real size only takes longer."""
    monkeypatch.setattr(groups, "_BLOCK_ENTRIES", 1 << 10)


over_operators = pytest.mark.parametrize("operator", PAIRS, ids=repr)


def random_rows(seed, sizes, keys=None):
    """Groups of the given sizes in random order, with equal scores."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    keys = rng.permutation(10**6)[: len(sizes)] - 5000 if keys is None else keys
    group = np.repeat(np.array(keys, np.int64), sizes)[rng.permutation(n)]
    corner = rng.uniform(0, 0.3, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 0.5, (n, 2))], 1)
    scores = rng.integers(1, 40, n) / 40
    return Rows(group, np.float32(scores), np.float32(boxes), np.int32(rng.integers(0, 3, n)))


def assert_equals_group_by_group(rows, operator):
    out, source = apply_operator(rows, operator)
    np.testing.assert_array_equal(out.group, rows.group[source])
    np.testing.assert_array_equal(out.model, rows.model[source])
    assert len(np.unique(source)) == len(source) == len(out)
    # By group, then falling score of the input, then row.
    np.testing.assert_array_equal(
        np.lexsort((source, -rows.scores[source], out.group)), np.arange(len(out))
    )
    expected = {}
    for key in np.unique(rows.group):
        mine = np.flatnonzero(rows.group == key)
        result = PAIRS[operator](rows.boxes[mine], rows.scores[mine], rows.model[mine])
        expected |= {mine[row]: value for row, value in result.items()}
    assert sorted(source.tolist()) == sorted(expected)
    for place, row in enumerate(source):
        np.testing.assert_allclose(out.scores[place], expected[row][0], rtol=2e-5)
        np.testing.assert_allclose(out.boxes[place], expected[row][1], rtol=2e-5, atol=1e-6)
    return source


@over_operators
def test_groups_of_many_sizes(operator):
    rng = np.random.default_rng(1)
    sizes = [1] * 30 + rng.integers(2, 17, 20).tolist() + [60]
    assert_equals_group_by_group(random_rows(2, sizes), operator)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 2**31))
def test_any_list_of_sizes(sizes, seed):
    # One group of 16, so that all examples share a program.
    assert_equals_group_by_group(random_rows(seed, [*sizes, 16]), SoftNms(min_score=0.2))


def test_blocks_cut_nothing(monkeypatch):
    """More groups than fit a block, two buckets, four devices: same rows, same values."""
    rows = random_rows(3, [1] * 20 + [3, 4] * 70 + [16] * 5)
    whole, source = apply_operator(rows, SoftNms())
    monkeypatch.setattr(groups, "_BLOCK_ENTRIES", 64)
    assert set(groups.bucket_sizes(np.array([1] * 20 + [3, 4] * 70 + [16] * 5))) == {4, 16}
    cut, cut_source = apply_operator(rows, SoftNms())
    np.testing.assert_array_equal(cut_source, source)
    np.testing.assert_allclose(cut.scores, whole.scores, rtol=1e-6)
    np.testing.assert_array_equal(cut.boxes, whole.boxes)


def test_keys_far_apart():
    rows = random_rows(4, [3, 4, 5], keys=[-(2**62), 7, 2**62])
    assert_equals_group_by_group(rows, SoftNms(min_score=0.2))


@over_operators
def test_no_rows(operator):
    out, source = apply_operator(random_rows(0, []), operator)
    assert len(out) == len(source) == 0 and out.boxes.shape == (0, 4)


def test_ranking_is_by_group_then_score_then_row():
    rng = np.random.default_rng(5)
    group = rng.integers(-3, 3, 500)
    scores = np.float32(rng.integers(0, 5, 500) / 4)
    order = groups.rank_rows(group, scores)
    np.testing.assert_array_equal(order, np.lexsort((np.arange(500), -scores, group)))


def test_negative_zero_is_zero():
    order = groups.rank_rows(np.zeros(3, np.int64), np.float32([0.0, -0.0, 0.5]))
    np.testing.assert_array_equal(order, [2, 0, 1])


def test_small_buckets_share_a_program():
    """Groups too few to fill a block are padded to the size of the next greater ones."""
    assert set(groups.bucket_sizes(np.array([1, 2, 3, 5, 9]))) == {16}
    many = np.repeat([1, 3], 40_000)
    np.testing.assert_array_equal(groups.bucket_sizes(many), np.repeat([1, 4], 40_000))
