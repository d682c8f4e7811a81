"""Every operator equals its brute-force twin, also among ties, empty boxes and odd thresholds."""

import dataclasses
import functools

import jax
import jax.export
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.io.errors import UserError
from ensemble.operators import AdjNms, Nms, Nmw, SoftNms, Voting, WeightedBoxesFusion, make_operator
from tests.oracles import ensembling as twin

WEIGHTS = (1.0, 0.5, 2.0)
CONFIDENCES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")

# operator -> what it makes of one group by brute force
PAIRS = {
    Nms(0.5): lambda b, s, m: twin.nms(b, s, 0.5),
    Nms(0.0): lambda b, s, m: twin.nms(b, s, 0.0),
    SoftNms(): lambda b, s, m: twin.soft_nms(b, s, "gaussian", 0.5, None, 1e-3),
    SoftNms("gaussian", sigma=0.1, min_score=0.05): lambda b, s, m: twin.soft_nms(
        b, s, "gaussian", 0.1, None, 0.05
    ),
    SoftNms("linear"): lambda b, s, m: twin.soft_nms(b, s, "linear", None, 0.3, 1e-3),
    AdjNms(): lambda b, s, m: twin.adj_nms(b, s, 0.5, 0.5),
    AdjNms(0.6, 0.3, sequential=False): lambda b, s, m: twin.adj_nms(b, s, 0.6, 0.3, False),
    Nmw(): lambda b, s, m: twin.nmw(b, s, 0.55),
    Voting(): lambda b, s, m: twin.voting(b, s, 0.5, 4, 0.05, 0.3, "mean", 0.5),
    Voting(k=2, few="fixed", sigma=None): lambda b, s, m: twin.voting(
        b, s, 0.5, 2, 0.05, 0.3, "fixed", None
    ),
    WeightedBoxesFusion(WEIGHTS, allows_overflow=True): lambda b, s, m: twin.wbf(
        b, s, m, WEIGHTS, 0.55, "avg", True
    ),
} | {
    WeightedBoxesFusion(WEIGHTS, conf_type=c): lambda b, s, m, c=c: twin.wbf(
        b, s, m, WEIGHTS, 0.55, c
    )
    for c in CONFIDENCES
}
G, N = 4, 12  # one shape for all tests, so that they share programs
over_operators = pytest.mark.parametrize("operator", PAIRS, ids=repr)


@functools.cache
def jitted(operator):
    return jax.jit(operator)


def random_groups(seed, groups=G, n=N):
    """Boxes around two objects a group, scores with ties, entries missing anywhere."""
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0, 0.5, (groups, 2, 2))
    centre = objects[np.arange(groups)[:, None], rng.integers(0, 2, (groups, n))]
    corner = centre + rng.normal(0, 0.04, (groups, n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 0.4, (groups, n, 2))], -1)
    scores = rng.integers(1, 12, (groups, n)) / 12
    models = rng.integers(0, len(WEIGHTS), (groups, n))
    valid = rng.random((groups, n)) < rng.random((groups, 1)) * 1.2
    return np.float32(boxes), np.float32(scores), np.int32(models), valid


def assert_equals_twin(operator, boxes, scores, models, valid):
    out = [np.asarray(a) for a in jitted(operator)(boxes, scores, models, valid)]
    assert out[0].shape == boxes.shape and out[1].shape == out[2].shape == scores.shape
    for g in range(len(boxes)):
        rows = np.flatnonzero(valid[g])
        expected = PAIRS[operator](boxes[g, rows], scores[g, rows], models[g, rows])
        places = {place: row for place, row in enumerate(twin.ranked(scores[g, rows]))}
        found = {
            places.get(place): (out[1][g, place], out[0][g, place])
            for place in np.flatnonzero(out[2][g])
        }
        assert sorted(found) == sorted(expected)
        for row, (score, box) in expected.items():
            np.testing.assert_allclose(found[row][0], score, rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(found[row][1], box, rtol=2e-5, atol=1e-6)


@over_operators
def test_equals_brute_force_on_random_boxes(operator):
    for seed in range(3):
        assert_equals_twin(operator, *random_groups(seed))


# Small integers: IoUs are often equal or just at a threshold, all exact in float32.
@over_operators
@settings(max_examples=12, deadline=None)
@given(
    hnp.arrays(np.int8, (N, 4), elements=st.integers(0, 5)),
    hnp.arrays(np.int8, N, elements=st.integers(0, 4)),
    hnp.arrays(np.int32, N, elements=st.integers(0, 2)),
    hnp.arrays(bool, (G, N)),
)
def test_equals_brute_force_on_adversarial_boxes(operator, boxes, scores, models, valid):
    boxes = np.float32(boxes)
    boxes[:, 2:] += boxes[:, :2]
    if isinstance(operator, SoftNms | AdjNms | Voting):
        # Lowered scores that tie would tie but for rounding.
        scores = scores + np.arange(N) / 16
    if isinstance(operator, WeightedBoxesFusion):
        # So would the overlaps with two mean boxes.
        boxes += np.random.default_rng(0).normal(0, 0.01, boxes.shape).astype(np.float32)
    groups = [np.stack([a] * G) for a in (boxes / 8, np.float32(scores) / 8, models)]
    assert_equals_twin(operator, *groups, valid)


def run(operator, boxes, scores, models=None):
    """Rows out of one group: boxes and scores of the valid ones."""
    count = len(scores)
    arrays = np.zeros((G, N, 4), np.float32), np.zeros((G, N), np.float32)
    arrays += np.zeros((G, N), np.int32), np.zeros((G, N), bool)
    arrays[0][0, :count], arrays[1][0, :count], arrays[3][0, :count] = boxes, scores, True
    arrays[2][0, :count] = 0 if models is None else models
    boxes, scores, valid = (np.asarray(a) for a in jitted(operator)(*arrays))
    assert not valid[1:].any()
    return boxes[valid], scores[valid]


BOX = [0.125, 0.125, 0.625, 0.625]
HALF = [0.125, 0.125, 0.625, 0.375]  # IoU with BOX is 0.5


def test_adj_nms_keeps_boxes_at_the_threshold_and_lowers_them():
    """A decay of exp(-0.5) at IoU 0.5: the least factor that step 2 can have on a pair."""
    boxes, scores = run(AdjNms(), [BOX, BOX, HALF], [0.9, 0.8, 0.7])
    np.testing.assert_array_equal(boxes, np.float32([BOX, HALF]))
    np.testing.assert_allclose(scores, [0.9, 0.7 * np.exp(-0.5)], rtol=1e-6)


def test_soft_nms_ranks_anew_after_every_step():
    """The third box passes the second, which the first has lowered, and lowers it once more."""
    boxes = [[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0.5, 1, 1.5]]
    _, scores = run(SoftNms(sigma=0.5), boxes, [0.9, 0.8, 0.7])
    second = 0.8 * np.exp(-(0.9**2) / 0.5)
    third = 0.7 * np.exp(-((1 / 3) ** 2) / 0.5)
    assert second < third
    between = 0.4 / 1.5
    np.testing.assert_allclose(
        scores, [0.9, second * np.exp(-(between**2) / 0.5), third], rtol=1e-5
    )


def test_four_equal_votes_raise_the_score_by_a_fifth():
    """Equation 8: 1 + 4 * 0.05, which may exceed 1; equation 9 leaves equal boxes alone."""
    boxes, scores = run(Voting(), [BOX] * 7, [1.0] * 7)
    np.testing.assert_allclose(scores, [1.2], rtol=1e-6)
    np.testing.assert_allclose(boxes, [BOX], rtol=1e-6)


@pytest.mark.parametrize(
    "operator, share", [(Voting(), 0.3), (Voting(k=2, few="fixed", sigma=None), 0.3 / 2)], ids=repr
)
def test_one_vote_alone(operator, share):
    near = [0.125, 0.125, 0.625, 0.6]
    boxes, scores = run(operator, [BOX, near], [0.8, 0.4])
    np.testing.assert_allclose(scores, [0.8 + 0.05 * 0.4], rtol=1e-6)
    expected = (1 - share) * np.array(BOX) + share * np.array(near)
    np.testing.assert_allclose(boxes, [expected], rtol=1e-6)


def test_votes_come_from_the_greatest_overlaps_not_the_best_scores():
    boxes = [BOX] + [[0.125, 0.125, 0.625, ymax] for ymax in (0.5, 0.6, 0.55)]
    _, scores = run(Voting(k=2, few="fixed", sigma=None), boxes, [0.8, 0.7, 0.2, 0.1])
    np.testing.assert_allclose(scores, [0.8 + 0.05 * (0.2 + 0.1)], rtol=1e-6)


@pytest.mark.parametrize("operator", [Nmw(), WeightedBoxesFusion(WEIGHTS)], ids=repr)
def test_zero_scores_make_no_nan(operator):
    boxes, scores = run(operator, [BOX, BOX], [0.0, 0.0])
    np.testing.assert_array_equal(boxes, np.float32([BOX]))
    np.testing.assert_array_equal(scores, [0.0])


def test_many_models_are_told_apart():
    """More than fit one word of a bit set: five of 70 models agree, one of them twice."""
    operator = WeightedBoxesFusion((1.0,) * 70, conf_type="box_and_model_avg")
    _, scores = run(operator, [BOX] * 6, [0.7] * 6, [0, 30, 31, 69, 69, 62])
    np.testing.assert_allclose(scores, [0.7 * 5 / 70], rtol=1e-5)


def test_config_makes_operators():
    config = {"name": "soft_nms", "method": "linear", "iou_threshold": 0.4}
    assert make_operator(config) == SoftNms("linear", iou_threshold=0.4)
    assert make_operator({"name": "voting", "sigma": None}) == Voting(sigma=None)
    assert make_operator({"name": "wbf"}, [1, 0.5]) == WeightedBoxesFusion((1.0, 0.5))
    assert make_operator({"name": "wbf", "model_weights": [1, 2]}).model_weights == (1.0, 2.0)
    assert make_operator({"name": "adj_nms"}) == AdjNms()
    assert make_operator({"name": "nmw"}) == Nmw() and make_operator({"name": "nms"}) == Nms()


@pytest.mark.parametrize(
    "config, words",
    [
        ({"name": "nmss"}, "operator.name 'nmss': unknown, expected one of nms, soft_nms"),
        ({}, "operator.name None: unknown"),
        ({"name": "nms", "sigma": 1.0}, "operator.sigma: nms has no such setting, expected iou_"),
        ({"name": "wbf"}, "operator.model_weights"),
        ({"name": "wbf", "model_weights": [0, 0]}, "operator.model_weights"),
        ({"name": "wbf", "model_weights": [1], "conf_type": "min"}, "operator.conf_type 'min'"),
        ({"name": "nms", "iou_threshold": 1.5}, "operator.iou_threshold 1.5"),
        ({"name": "nms", "iou_threshold": "x"}, "operator.iou_threshold 'x'"),
        ({"name": "soft_nms", "sigma": 0.0}, "operator.sigma 0.0"),
        ({"name": "soft_nms", "sigma": None}, "operator.sigma None"),
        ({"name": "soft_nms", "method": "hard"}, "operator.method 'hard'"),
        ({"name": "voting", "k": 0}, "operator.k 0"),
        ({"name": "voting", "few": "none"}, "operator.few 'none'"),
        ({"name": "voting", "box_weight": 1.1}, "operator.box_weight 1.1"),
    ],
    ids=str,
)
def test_wrong_config_is_one_line(config, words):
    with pytest.raises(UserError) as error:
        make_operator(config)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "operator", [Voting(), Nmw(), WeightedBoxesFusion(WEIGHTS, conf_type=CONFIDENCES[3])], ids=repr
)
def test_programs_exist_for_tpu_and_gpu(operator):
    shapes = [((G, N, 4), np.float32), ((G, N), np.float32), ((G, N), np.int32), ((G, N), bool)]
    exported = jax.export.export(jitted(operator), platforms=("tpu", "cuda"))(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    assert exported.platforms == ("tpu", "cuda")


@over_operators
def test_operators_are_hashable_and_equal_by_value(operator):
    again = dataclasses.replace(operator)
    assert again == operator and hash(again) == hash(operator)
