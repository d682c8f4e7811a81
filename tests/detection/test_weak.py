"""The weakly supervised head, mining and losses against their twins.

Shape legend: B images, P proposals, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detection.assign import mining
from detection.assign.rois import sample_rois
from detection.losses.weak import mil_scores, presence_loss, refinement_loss
from detection.models.weak_branch import image_truth, right_boxes
from detection.structures import Proposals
from tests.oracles import weak as oracle

B, P, K = 3, 12, 5


def make_case(seed: int) -> dict[str, np.ndarray]:
    """Random logits, boxes and truth; one image has no proposal at all."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (B, P, 2))
    case = {
        "class_logits": rng.normal(0, 2, (B, P, K)),
        "proposal_logits": rng.normal(0, 2, (B, P, K)),
        "refined": rng.normal(0, 2, (B, P, K + 1)),
        "boxes": np.concatenate([corner, corner + rng.uniform(4, 16, (B, P, 2))], axis=-1),
    }
    case = {name: value.astype(np.float32) for name, value in case.items()}
    case["valid"] = rng.random((B, P)) < 0.7
    case["valid"][-1] = False
    case["present"] = rng.random((B, K)) < 0.5
    case["verified"] = case["present"] | (rng.random((B, K)) < 0.5)
    return case


def value_and_gradients(class_logits, proposal_logits, case, class_stream):
    def loss(class_logits, proposal_logits):
        _, log_presence = mil_scores(class_logits, proposal_logits, case["valid"], class_stream)
        counted = case["valid"].any(axis=1)
        return presence_loss(log_presence, case["present"], case["verified"], counted)

    return jax.value_and_grad(loss, (0, 1))(class_logits, proposal_logits)


@pytest.mark.parametrize("class_stream", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_loss_and_gradients_are_those_of_the_twin(seed, class_stream):
    case = make_case(seed)
    streams = case["class_logits"], case["proposal_logits"]
    scores, log_presence = mil_scores(*streams, case["valid"], class_stream)
    total, gradients = 0.0, []
    for image in range(B):
        valid, present = case["valid"][image], case["present"][image]
        logits = [stream[image].astype(np.float64) for stream in streams]
        expected, presence = oracle.mil_scores(*logits, valid, class_stream)
        np.testing.assert_allclose(scores[image], expected, rtol=1e-4, atol=1e-7)
        if not valid.any():
            gradients.append([np.zeros((P, K))] * 2)
            continue
        np.testing.assert_allclose(np.exp(log_presence[image]), presence, rtol=1e-4)
        verified = case["verified"][image]
        total += oracle.presence_loss(presence, present, verified) / 2  # two images have proposals
        slope = np.where(present, -1 / presence, 1 / (1 - presence)) * verified / 2
        gradients.append(oracle.mil_gradients(*logits, valid, class_stream, slope))
    value, found = value_and_gradients(*streams, case, class_stream)
    np.testing.assert_allclose(value, total, rtol=1e-4)
    for number in range(2):
        expected = np.stack([pair[number] for pair in gradients])
        np.testing.assert_allclose(found[number], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("class_stream", ["softmax", "sigmoid"])
def test_padded_proposals_never_matter(class_stream):
    case = make_case(2)
    streams = case["class_logits"], case["proposal_logits"]
    padded = ~case["valid"][..., None]
    other = [np.where(padded, np.float32(50.0), stream) for stream in streams]
    expected, gradients = value_and_gradients(*streams, case, class_stream)
    value, moved = value_and_gradients(*other, case, class_stream)
    assert value == expected
    for gradient, again in zip(gradients, moved, strict=True):
        np.testing.assert_array_equal(gradient, again)
        assert (np.asarray(again)[~case["valid"]] == 0).all()
    scores, _ = mil_scores(*streams, case["valid"], class_stream)
    far = np.where(padded, np.float32(1e6), case["boxes"])
    for rule in ("top1", "mist"):
        seeds, again = (mine_all(rule, scores, boxes, case) for boxes in (case["boxes"], far))
        jax.tree.map(np.testing.assert_array_equal, seeds, again)


def mine_all(rule, scores, boxes, case, max_seeds=4, threshold=0.02):
    options = dict(max_seeds=max_seeds, threshold=threshold)
    if rule == "mist":
        options |= dict(top_share=0.4, seed_iou=0.2)
    find = mining.several_seeds if rule == "mist" else mining.top_seeds
    return jax.vmap(lambda *image: find(*image, **options))(
        scores, boxes, case["valid"], case["present"]
    )


@pytest.mark.parametrize("rule", ["top1", "mist"])
@pytest.mark.parametrize("seed", range(3))
def test_mined_boxes_are_those_of_the_twin(rule, seed):
    case = make_case(seed)
    scores, _ = mil_scores(case["class_logits"], case["proposal_logits"], case["valid"], "softmax")
    scores = np.asarray(scores)
    for max_seeds, threshold in ((4, 0.02), (2, 0.0), (9, 0.1)):
        seeds = mine_all(rule, scores, case["boxes"], case, max_seeds, threshold)
        for image in range(B):
            arguments = (scores[image], case["boxes"][image], case["valid"][image])
            arguments = (*arguments, case["present"][image], max_seeds, threshold)
            if rule == "mist":
                expected = oracle.several_seeds(*arguments, 0.4, 0.2)
            else:
                expected = oracle.top_seeds(*arguments)
            found = [np.asarray(column)[image] for column in seeds]
            rows = [
                (score, class_, tuple(box))
                for box, class_, score, valid in zip(*found, strict=True)
                if valid
            ]
            assert rows == expected
            labels, weights = mining.spread(
                mining.Seeds(*(column[image] for column in seeds)), case["boxes"][image], 0.1
            )
            expected = oracle.spread(expected, case["boxes"][image], 0.1)
            np.testing.assert_array_equal(labels, expected[0])
            np.testing.assert_allclose(weights, expected[1])


def test_a_proposal_stands_for_one_class():
    """The best proposal of both is taken by the surer class; the other has its second best."""
    scores = jnp.array([[0.6, 0.5], [0.1, 0.45], [0.05, 0.02]])
    boxes = jnp.array([[0.0, 0, 4, 4], [8, 8, 12, 12], [20, 20, 24, 24]])
    seeds = mining.top_seeds(scores, boxes, jnp.ones(3, bool), jnp.ones(2, bool), 4)
    np.testing.assert_allclose(seeds.scores[:2], [0.6, 0.45])
    np.testing.assert_array_equal(seeds.classes[:2], [0, 1])
    np.testing.assert_array_equal(seeds.boxes[:2], boxes[:2])
    labels, _ = mining.spread(seeds, boxes, 0.1)
    np.testing.assert_array_equal(labels, [1, 2, 0])


def test_refinement_loss_is_that_of_the_twin():
    case, rng = make_case(4), np.random.default_rng(4)
    labels, weights = rng.integers(0, K + 1, (B, P)), rng.random((B, P)).astype(np.float32)
    found = refinement_loss(case["refined"], labels, weights, case["valid"])
    expected = oracle.refinement_loss(case["refined"], labels, weights, case["valid"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ancestors_of_present_classes_and_unverified_ones_count_as_unknown():
    ancestors = np.zeros((3, 3), bool)
    ancestors[1, 0] = True  # a man is a person
    labels = np.int8([[1, 1, 0], [1, -1, 0], [-1, -1, 1]])
    truth = image_truth(labels, jnp.asarray(ancestors))
    assert truth.present.tolist() == [
        [False, True, False],
        [True, False, False],
        [False] * 2 + [True],
    ]
    assert truth.verified.tolist() == [[False, True, False], [True, True, False], [True] * 3]


def test_mined_boxes_are_right_or_wrong_where_boxes_are_known():
    boxes = np.tile(np.float32([[0, 0, 4, 4], [8, 8, 12, 12]]), (3, 1, 1))
    mined = mining.Seeds(
        jnp.asarray(boxes), np.zeros((3, 2), np.int32), np.ones((3, 2)), np.ones((3, 2), bool)
    )
    batch = {
        "gt_boxes": boxes[:, :1],
        "gt_classes": np.zeros((3, 1), np.int32),
        "gt_valid": np.array([[True], [False], [True]]),  # the second has labels alone
        "image_valid": np.array([True, True, False]),
    }
    assert right_boxes(mined, batch, None) == {"mined_right": 0.5}


def test_regions_of_mined_boxes_weigh_as_much_and_background_is_near_them():
    case = make_case(5)
    batch = {
        "gt_boxes": case["boxes"][:, :3] + 1,
        "gt_classes": np.tile(np.int32([4, 0, 2]), (B, 1)),
        "gt_valid": np.array([[True, True, False], [True, False, False], [False] * 3]),
        "gt_weights": np.tile(np.float32([0.9, 0.5, 0.0]), (B, 1)),
        "image_valid": np.ones(B, bool),
    }
    targets = sample_rois(
        jax.random.split(jax.random.key(0), B),
        Proposals(jnp.asarray(case["boxes"]), np.ones((B, P), bool)),
        batch,
        iou=0.5,
        ignore_ioa=0.5,
        num_samples=P,
        positive_fraction=0.5,
        background_iou=0.1,
    )
    assert not targets.valid[2].any()  # nothing was mined there: nothing is background
    for image in range(2):
        for roi in np.flatnonzero(targets.valid[image]):
            box = np.asarray(targets.boxes[image, roi])
            overlaps = [
                oracle.iou(box, truth) if valid else -1.0
                for truth, valid in zip(
                    batch["gt_boxes"][image], batch["gt_valid"][image], strict=True
                )
            ]
            nearest = int(np.argmax(overlaps))
            label = batch["gt_classes"][image, nearest] + 1 if overlaps[nearest] >= 0.5 else 0
            assert targets.labels[image, roi] == label and overlaps[nearest] >= 0.1
            assert targets.weights[image, roi] == batch["gt_weights"][image, nearest]
        assert (targets.labels[image][targets.valid[image]] == 0).any()
    losses = jnp.ones((B, P))
    np.testing.assert_array_equal(targets.first(2).weighted(losses[:, :2]), targets.weights[:, :2])
