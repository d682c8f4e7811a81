"""What annotations leave open teaches nothing: ignore regions, and classes that a source lacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import boxes as box_ops
from common.training.step import init_variables
from detection.assign.anchors import grid_anchors
from detection.classifiers.softmax import Softmax
from detection.losses.classification import softmax_cross_entropy
from detection.losses.roi_class import ClassLosses
from detection.losses.rpn import rpn_losses
from detection.losses.weights import Term
from detection.models.faster_rcnn import build
from detection.models.second_stage import RoIBranch, stage_losses
from detection.settings import read_run
from detection.structures import HeadOutput, Proposals
from tests import tiny
from tests.detection.test_faster_rcnn import make_batch

STDS = (0.1, 0.1, 0.2, 0.2)
CROWD = [32.0, 32.0, 64.0, 64.0]


def crowd_batch(crowds=(CROWD,)):
    """One image with an object at the top left, and one inside the crowd that is annotated."""
    batch = {
        "image_size": np.full((1, 2), 64, np.float32),
        "image_valid": np.ones(1, bool),
        "gt_boxes": np.float32([[[4, 4, 20, 20], [36, 36, 52, 52], [0, 0, 0, 0]]]),
        "gt_classes": np.int32([[0, 1, 0]]),
        "gt_valid": np.array([[True, True, False]]),
        "ignore_boxes": np.zeros((1, 4, 4), np.float32),
        "ignore_valid": np.zeros((1, 4), bool),
    }
    batch["ignore_boxes"][0, : len(crowds)] = np.reshape(crowds, (-1, 4))
    batch["ignore_valid"][0, : len(crowds)] = True
    return batch


def rpn_gradients(batch):
    """Gradient of the RPN's losses by the logits and deltas of all anchors; all are sampled."""
    anchors = grid_anchors([(8, 8)], [8], [2.0], [1.0])
    options = dataclasses.replace(tiny.settings().model.rpn.loss, num_samples=64)
    logits = [jax.random.normal(jax.random.key(1), (1, 64))]
    deltas = [jax.random.normal(jax.random.key(2), (1, 64, 4))]

    def loss(outputs):
        keys = jax.random.split(jax.random.key(0), 1)
        terms = rpn_losses(keys, *outputs, anchors, batch, options, ignore_ioa=0.5)
        return sum(terms.values())

    (logits,), (deltas,) = jax.jit(jax.grad(loss))((logits, deltas))
    return np.asarray(anchors[0]), np.asarray(logits[0]), np.asarray(deltas[0])


def test_anchors_in_a_crowd_are_no_background_and_its_objects_stay_positive():
    anchors, logits, deltas = rpn_gradients(crowd_batch())
    inside = np.asarray(box_ops.ioa(anchors, np.float32([CROWD])))[:, 0] > 0.5
    object_inside = np.float32([[36, 36, 52, 52]])
    positive = np.asarray(box_ops.iou(anchors, object_inside))[:, 0] >= 0.7
    assert positive.any() and (inside & ~positive).sum() > 10
    assert (logits[inside & ~positive] == 0).all() and (deltas[inside & ~positive] == 0).all()
    assert (logits[positive] != 0).all() and (deltas[positive] != 0).any()
    # Far from both objects, background inside and outside of the same region.
    far = np.asarray(box_ops.iou(anchors, crowd_batch()["gt_boxes"][0])).max(axis=1) < 0.3
    assert (logits[far & ~inside] != 0).all()
    _, without, _ = rpn_gradients(crowd_batch(crowds=()))
    assert (without[far] != 0).all()


def test_images_with_unknown_classes_have_no_background_anchors():
    batch = crowd_batch(crowds=()) | {"class_known": np.array([[True, True]])}
    _, everything, _ = rpn_gradients(batch)
    batch["class_known"] = np.array([[True, False]])
    anchors, logits, _ = rpn_gradients(batch)
    positive = np.asarray(box_ops.iou(anchors, batch["gt_boxes"][0])).max(axis=1) >= 0.7
    assert positive.any()
    np.testing.assert_array_equal(logits != 0, positive)
    assert (everything != 0).sum() > positive.sum()


def stage_gradients(batch):
    """Gradient of the losses of each of three stages by an offset inside the crowd."""

    def head(offset):
        def call(pool, boxes, train, num_regressed):
            inside = box_ops.ioa(boxes, jnp.float32([CROWD]))[..., 0] > 0.5
            on_object = box_ops.iou(boxes, batch["gt_boxes"])[..., :2].max(axis=-1) >= 0.5
            shift = offset * (inside & ~on_object)
            logits = jnp.zeros((*boxes.shape[:2], 3)) + shift[..., None] * jnp.arange(3.0)
            deltas = jnp.zeros((*boxes.shape[:2], 2, 4)) + shift[..., None, None]
            return HeadOutput(logits, deltas[:, :num_regressed], boxes[:, :num_regressed])

        return call

    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 48, (1, 60, 2))
    boxes = np.concatenate([corner, corner + 12], -1).astype(np.float32)
    config = tiny.get_config()
    config.model.box_head.sample.num_samples = 70
    config.model.stages.update(
        iou=(0.5,) * 3, stds=(STDS,) * 3, loss_weights=(1.0,) * 3, score_weights=(1.0,) * 3
    )

    def losses(offsets):
        terms, _ = stage_losses(
            [RoIBranch([], None, [head(offset) for offset in offsets])],
            jax.random.split(jax.random.key(0), 1),
            Proposals(boxes, np.ones((1, 60), bool)),
            batch,
            read_run(config).model,
            ClassLosses(Softmax(2), jax.random.key(0), {}),
        )
        return {str(term): value for term, value in terms.items()}

    return jax.jit(jax.jacrev(losses))(jnp.zeros(3))


def test_no_stage_of_a_cascade_learns_anything_inside_a_crowd():
    for name, gradient in stage_gradients(crowd_batch()).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)
    without = stage_gradients(crowd_batch(crowds=()))
    for stage in range(3):
        assert without[str(Term("box_class", None, stage))][stage] != 0


def test_unknown_classes_are_left_out_of_the_softmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)).astype(np.float32)
    known = np.array([[True, False, True], [True, True, True]])
    labels = np.array([[0, 1, 3, 0, 1], [0, 1, 2, 3, 0]])
    found = softmax_cross_entropy(Softmax(3).mask_unknown(logits, known), labels)
    for image in range(2):
        columns = np.flatnonzero(np.r_[True, known[image]])
        for region in range(5):
            row = np.exp(logits[image, region, columns].astype(np.float64))
            share = row[list(columns).index(labels[image, region])] / row.sum()
            np.testing.assert_allclose(found[image, region], -np.log(share), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two_fc", "decoupling"])
def test_rows_of_an_unknown_class_get_no_gradient(kind):
    config = tiny.get_config()
    config.model.box_head.kind = kind
    model = build(read_run(config).model, 3)
    variables = jax.jit(lambda: init_variables(model, 0, tiny.init_shapes()))()
    batch = make_batch(2)
    batch["gt_valid"] &= batch["gt_classes"] != 2

    @jax.jit
    def gradients(params, batch):
        def loss(params):
            return sum(tiny.losses(model, {**variables, "params": params}, batch).values())

        return jax.grad(loss)(params)["box_head"]

    known = np.array([[True, True, False]] * 2)
    masked = gradients(variables["params"], batch | {"class_known": known})
    plain = gradients(variables["params"], batch)
    heads = [(masked, plain)]
    if kind == "decoupling":
        heads.append((masked["sibling"], plain["sibling"]))
    for gradient, without_mask in heads:
        rows = np.asarray(gradient["classifier"]["kernel"])
        assert (rows[:, 3] == 0).all() and np.abs(rows[:, :3]).max(axis=0).all()
        assert np.abs(np.asarray(without_mask["classifier"]["kernel"])[:, 3]).max() > 0
