"""Cascades: stages, weights, what passes from one to the next."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import boxes as box_ops
from common.io.errors import UserError
from common.io.settings import read_settings
from configs.detection import base
from detection.classifiers.softmax import Softmax
from detection.losses.roi_class import ClassLosses
from detection.losses.weights import Term
from detection.models import second_stage
from detection.models.second_stage import RoIBranch
from detection.models.settings import ModelSettings, StageSettings
from detection.structures import HeadOutput, Proposals

STDS = (0.1, 0.1, 0.2, 0.2)
SIZE = np.full((1, 2), 100.0, np.float32)


def settings(**fields):
    config = base.get_config().model.stages
    config.update(fields)
    return read_settings(StageSettings, config, "config.model.stages")


def head_that(probabilities, move):
    """A head that says the same of every region and moves its box of each class by `move`."""

    def head(pool, boxes, train, num_regressed=None):
        batch, regions = boxes.shape[:2]
        logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (batch, regions, 3))
        target = boxes[:, :, None] + jnp.array(move, jnp.float32)
        deltas = box_ops.encode(target, boxes[:, :, None], STDS)
        return HeadOutput(logits, deltas[:, :num_regressed], boxes[:, :num_regressed])

    return head


def proposals_of(*boxes):
    return Proposals(jnp.array([boxes], jnp.float32), jnp.ones((1, len(boxes)), bool))


def detect(heads, stages, *more_heads):
    branches = [RoIBranch([], None, branch) for branch in (heads, *more_heads)]
    proposals = proposals_of([10, 10, 30, 30])
    return second_stage.detect_stages(branches, proposals, SIZE, stages, Softmax(2))


def two_stages(**fields):
    return settings(iou=(0.5, 0.6), stds=(STDS, STDS), loss_weights=(1.0, 1.0), **fields)


def test_scores_are_the_weighted_mean_of_the_stages():
    stages = two_stages(score_weights=(0.75, 0.25))
    first, second = [0.2, 0.5, 0.3], [0.6, 0.1, 0.3]
    heads = [head_that(p, np.zeros((2, 4))) for p in (first, second)]
    scores, _ = detect(heads, stages)
    np.testing.assert_allclose(
        scores[0, 0], 0.75 * np.array(first) + 0.25 * np.array(second), rtol=1e-5
    )
    scores, _ = detect(heads, two_stages(score_weights=(0.75, 0.25), average="logit"))
    mean = np.array(first) ** 0.75 * np.array(second) ** 0.25
    np.testing.assert_allclose(scores[0, 0], mean / mean.sum(), rtol=1e-5)


def test_boxes_pass_on_by_the_best_class_and_are_clipped():
    stages = two_stages(score_weights=(1.0, 1.0))
    moves = np.array([[0, 0, 4, 0], [20, 20, 20, 20]], np.float32)
    # Class 1 (column 2) is best at first, though background has the highest score.
    heads = [head_that([0.6, 0.1, 0.3], moves), head_that([0.1, 0.8, 0.1], 3 * moves)]
    _, boxes = detect(heads, stages)
    np.testing.assert_allclose(boxes[0, 0, 0], [30, 30, 62, 50], atol=1e-3)
    np.testing.assert_allclose(boxes[0, 0, 1], [90, 90, 100, 100], atol=1e-3)
    _, boxes = detect(heads, two_stages(score_weights=(1.0, 1.0), box_stage=0))
    np.testing.assert_allclose(boxes[0, 0, 1], [30, 30, 50, 50], atol=1e-3)


def test_classes_come_from_the_first_branch_and_boxes_from_the_last():
    for_class = head_that([0.1, 0.2, 0.7], np.full((2, 4), 9.0))
    for_box = head_that([0.8, 0.1, 0.1], np.full((2, 4), 5.0))
    scores, boxes = detect([for_class], settings(), [for_box])
    np.testing.assert_allclose(scores[0, 0], [0.1, 0.2, 0.7], rtol=1e-5)
    np.testing.assert_allclose(boxes[0, 0, 0], [15, 15, 35, 35], atol=1e-3)


def losses_of(heads, stages):
    seen = []

    def recording(head):
        def call(pool, boxes, train, num_regressed):
            seen.append(np.asarray(boxes))
            return head(pool, boxes, train, num_regressed)

        return call

    batch = {
        "gt_boxes": jnp.array([[[40.0, 40.0, 60.0, 60.0], [0, 0, 0, 0]]]),
        "gt_classes": jnp.zeros((1, 2), jnp.int32),
        "gt_valid": jnp.array([[True, False]]),
        "image_size": SIZE,
        "image_valid": jnp.ones(1, bool),
    }
    config = base.get_config().model
    config.box_head.sample.update(num_samples=4, positive_fraction=0.5)
    model = dataclasses.replace(read_settings(ModelSettings, config), stages=stages)
    terms, monitor = second_stage.stage_losses(
        [RoIBranch([], None, [recording(h) for h in heads])],
        jax.random.split(jax.random.key(0), 1),
        proposals_of([41, 40, 61, 60], [0, 0, 20, 20]),
        batch,
        model,
        ClassLosses(Softmax(2), jax.random.key(0), {}),
    )
    return terms, monitor, seen


def test_the_next_stage_starts_from_refined_boxes_without_copies_of_the_truth():
    stages = two_stages(score_weights=(1.0, 1.0))
    head = head_that([0.3, 0.3, 0.4], np.array([[2.0] * 4, [5.0] * 4]))
    terms, _, seen = losses_of([head, head], stages)
    assert set(terms) == {
        Term(name, None, stage) for name in ("box_class", "box_regression") for stage in (0, 1)
    }
    second = {tuple(box) for box in np.round(seen[1][0]).tolist()}
    # The positive one moves as its class, background as its best class; the truth comes in anew.
    assert (43.0, 42.0, 63.0, 62.0) in second and (5.0, 5.0, 25.0, 25.0) in second
    assert (42.0, 42.0, 62.0, 62.0) not in second and (40.0, 40.0, 60.0, 60.0) in second


def test_stages_that_do_not_fit_together_are_named():
    with pytest.raises(UserError, match=r"config.model.stages.iou: found .*'iou': 3, 'stds': 1"):
        settings(iou=(0.5, 0.6, 0.7))
    with pytest.raises(UserError, match="average: found 'max', expected one of 'probability'"):
        settings(average="max")
    with pytest.raises(UserError, match="box_stage: found 1, expected one of the 1 stages"):
        settings(box_stage=1)
