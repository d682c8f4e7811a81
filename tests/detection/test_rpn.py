"""Proposals and their recall equal plain loops over levels and boxes."""

import jax
import numpy as np
import pytest

from detection.losses.rpn import recall
from detection.models.rpn import propose
from detection.models.settings import ProposalSettings
from detection.structures import Proposals
from tests.oracles import boxes as box_oracle
from tests.oracles import nms as nms_oracle

# Height, width of two images. Anchors, strides and deltas are such that float32 is exact.
IMAGE_SIZE = np.float32([[64, 64], [48, 40]])
LEVELS = {8: 64, 16: 16}  # side of the anchors: how many


def level(rng, side, count):
    corner = rng.integers(-4, 56, (count, 2))
    anchors = np.concatenate([corner, corner + side], -1).astype(np.float32)
    # No logit appears twice: the order of equal ones is free.
    logits = rng.permutation(2 * count).reshape(2, count).astype(np.float32) + 1 / side
    deltas = np.zeros((2, count, 4), np.float32)
    deltas[..., :2] = rng.integers(-4, 5, (2, count, 2)) / 4
    return logits, deltas, anchors


def best_boxes(image, levels, options):
    """(logit, box) of one image's proposals."""
    height, width = IMAGE_SIZE[image]
    best = []
    for logits, deltas, anchors in levels:
        candidates = []
        for i in np.argsort(-logits[image])[: options.pre_nms]:
            side = anchors[i, 2] - anchors[i, 0]
            box = anchors[i] + np.tile(deltas[image, i, :2] * side, 2)
            box = np.clip(box, 0, [width, height, width, height]).astype(np.float32)
            candidates.append((logits[image, i], box))
        scores, boxes = (np.array(x) for x in zip(*candidates, strict=True))
        valid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        kept = nms_oracle.greedy(boxes, scores, valid, options.nms_iou)
        best += [candidates[i] for i in kept]
    return sorted(best, key=lambda pair: -pair[0])[: options.post_nms]


@pytest.mark.parametrize("seed", range(10))
def test_proposals_are_the_best_of_each_level_after_nms(seed):
    rng = np.random.default_rng(seed)
    levels = [level(rng, side, count) for side, count in LEVELS.items()]
    options = ProposalSettings(pre_nms=24, post_nms=20, nms_iou=0.4)
    found = jax.tree.map(np.asarray, propose(*zip(*levels, strict=True), IMAGE_SIZE, options))
    for image in range(2):
        expected = best_boxes(image, levels, options)
        logits, boxes = (np.array(x) for x in zip(*expected, strict=True))
        np.testing.assert_array_equal(found.logits[image][found.valid[image]], logits)
        np.testing.assert_array_equal(found.boxes[image][found.valid[image]], boxes)


@pytest.mark.parametrize("seed", range(10))
def test_recall_counts_the_objects_that_a_proposal_covers(seed):
    rng = np.random.default_rng(seed)
    gt_boxes, boxes = (
        np.concatenate([corner, corner + rng.integers(4, 16, corner.shape)], -1).astype(np.float32)
        for corner in (rng.integers(0, 24, (3, 5, 2)), rng.integers(0, 24, (3, 30, 2)))
    )
    boxes[:, 0] = gt_boxes[:, 0]
    gt_valid, valid = rng.random((3, 5)) < 0.7, rng.random((3, 30)) < 0.5
    image_valid = np.array([True, True, False])
    covered = [
        any(box_oracle.iou(gt_boxes[i, j], b) >= 0.5 for b in boxes[i][valid[i]])
        for i in range(2)
        for j in np.flatnonzero(gt_valid[i])
    ]
    batch = {"gt_boxes": gt_boxes, "gt_valid": gt_valid, "image_valid": image_valid}
    found = recall(Proposals(boxes, valid), batch)
    np.testing.assert_allclose(found, np.mean(covered), rtol=1e-6)
    assert recall(Proposals(boxes, valid), batch | {"image_valid": np.zeros(3, bool)}) == 0
