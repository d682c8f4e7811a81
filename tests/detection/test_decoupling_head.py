"""Decoupling Head: margins by hand, shifts as specified, gradients where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.geometry import boxes as box_ops
from common.geometry.deform_roi import deform_roi_align
from common.geometry.roi_align import roi_align
from common.io.errors import UserError
from detection.classifiers.softmax import Softmax
from detection.losses.margin import margin_losses
from detection.models.decoupling_head import DecouplingHead, shifted
from detection.structures import HeadOutput, RoITargets

STDS = (0.1, 0.1, 0.2, 0.2)
TWO = Softmax(1)  # background and a class
OPTIONS = dict(stds=STDS, class_margin=0.2, box_margin=0.2, clip=True)


def logits_of(probabilities):
    return jnp.log(jnp.asarray(probabilities, jnp.float32))[None]


def one_image(labels, boxes, gt_boxes, valid=None):
    boxes, gt_boxes = (np.asarray(a, np.float32)[None] for a in (boxes, gt_boxes))
    labels = np.asarray(labels, np.int32)[None]
    valid = np.ones(labels.shape, bool) if valid is None else np.asarray(valid)[None]
    is_gt, matched_idx = np.zeros(labels.shape, bool), np.zeros(labels.shape, np.int32)
    return RoITargets(boxes, labels, gt_boxes, valid, is_gt, matched_idx)


def output_for(targets, decoupled, sibling, decoupled_boxes, sibling_boxes):
    """An output whose probabilities and decoded boxes (one class) are the given ones."""

    def head(probabilities, boxes, beside=None):
        boxes = jnp.asarray(boxes, jnp.float32)[None]
        deltas = box_ops.encode(boxes, targets.boxes, STDS)[:, :, None]
        return HeadOutput(logits_of(probabilities), deltas, jnp.asarray(targets.boxes), beside)

    return head(decoupled, decoupled_boxes, head(sibling, sibling_boxes))


BOX = [0.0, 0.0, 10.0, 10.0]
HALF = [0.0, 0.0, 10.0, 5.0]  # IoU 0.5 with BOX
MOST = [0.0, 0.0, 10.0, 9.0]  # IoU 0.9


def test_margins_equal_the_equations_on_cases_by_hand():
    targets = one_image([1, 0], [BOX, BOX], [BOX, BOX])
    output = output_for(
        targets,
        decoupled=[[0.3, 0.7], [0.5, 0.5]],
        sibling=[[0.4, 0.6], [0.9, 0.1]],
        decoupled_boxes=[HALF, BOX],
        sibling_boxes=[MOST, BOX],
    )
    terms = margin_losses(output, targets, np.ones(1, bool), TWO, **OPTIONS)
    # Object: 0.6 + 0.2 - 0.7. Background: the margin shrinks to 1 - 0.9, 0.9 + 0.1 - 0.5.
    np.testing.assert_allclose(terms["margin_class"], (0.1 + 0.5) / 2, rtol=1e-5)
    # IoU 0.9 + min(0.2, 0.1) - 0.5 on the only positive.
    np.testing.assert_allclose(terms["margin_box"], 0.5, rtol=1e-4)
    literal = margin_losses(output, targets, np.ones(1, bool), TWO, **OPTIONS | dict(clip=False))
    np.testing.assert_allclose(literal["margin_class"], (0.1 + 0.6) / 2, rtol=1e-5)
    np.testing.assert_allclose(literal["margin_box"], 0.6, rtol=1e-4)


def test_no_loss_beyond_the_margin_and_none_without_positives():
    targets = one_image([1], [BOX], [BOX])
    output = output_for(targets, [[0.1, 0.9]], [[0.5, 0.5]], [MOST], [HALF])
    terms = margin_losses(output, targets, np.ones(1, bool), TWO, **OPTIONS)
    assert terms["margin_class"] == 0 and terms["margin_box"] == 0
    background = one_image([0], [BOX], [BOX])
    terms = margin_losses(output, background, np.ones(1, bool), TWO, **OPTIONS)
    assert terms["margin_class"] == 0 and terms["margin_box"] == 0


def test_an_image_without_positives_counts_as_one_region():
    targets = one_image([1], [BOX], [BOX])
    both = jax.tree.map(lambda a: np.concatenate([a, a]), targets)
    both.labels[1] = 0
    output = output_for(targets, [[0.5, 0.5]], [[0.5, 0.5]], [BOX], [BOX])
    output = jax.tree.map(lambda a: jnp.concatenate([a, a]), output)
    alone = margin_losses(output, both, np.array([True, False]), TWO, **OPTIONS)["margin_class"]
    together = margin_losses(output, both, np.array([True, True]), TWO, **OPTIONS)["margin_class"]
    np.testing.assert_allclose([alone, together], [0.2, 0.1], rtol=1e-5)


def test_margins_push_the_decoupled_branch_and_never_the_sibling():
    targets = one_image([1], [BOX], [BOX])
    output = output_for(targets, [[0.6, 0.4]], [[0.5, 0.5]], [HALF], [MOST])

    def loss(output):
        return sum(margin_losses(output, targets, np.ones(1, bool), TWO, **OPTIONS).values())

    gradient = jax.grad(loss)(output)
    assert np.abs(gradient.logits).max() > 0 and np.abs(gradient.deltas).max() > 0
    # eq. 6 reaches the learned shift through the shifted box.
    assert np.abs(gradient.references).max() > 0
    for array in jax.tree.leaves(gradient.sibling):
        assert not np.asarray(array).any()


@pytest.fixture(scope="module")
def scene():
    key = jax.random.key(0)
    features = [jax.random.normal(key, (1, 32 // s * 2, 32 // s * 2, 8)) for s in (1, 2)]
    boxes = jnp.array([[[4.0, 6.0, 40.0, 30.0], [20.0, 12.0, 60.0, 60.0]]])

    def pool(boxes, offsets=None):
        if offsets is None:
            return roi_align(features, boxes, (4, 8), output_size=7)
        return deform_roi_align(features, boxes, offsets, (4, 8), output_size=7)

    return pool, boxes


def test_zero_shifts_read_what_roi_align_reads(scene):
    pool, boxes = scene
    head = DecouplingHead(Softmax(3), width=16, offset_width=8, offset_init="zero")
    variables = head.init(jax.random.key(1), pool, boxes, True)
    output = head.apply(variables, pool, boxes, True)
    np.testing.assert_array_equal(output.references, boxes)
    params = variables["params"]
    # With the towers' weights in its place, the sibling computes the same logits.
    params = params | {
        "sibling": params["sibling"]
        | {f"fc{i}": params[f"class_fc{i}"] for i in (1, 2)}
        | {"classifier": params["classifier"]}
    }
    output = head.apply({"params": params}, pool, boxes, True)
    np.testing.assert_allclose(output.logits, output.sibling.logits, rtol=1e-4, atol=1e-6)


def test_inference_leaves_the_sibling_out(scene):
    pool, boxes = scene
    head = DecouplingHead(Softmax(3), width=16, offset_width=8)
    variables = head.init(jax.random.key(1), pool, boxes, True)
    without = {k: v for k, v in variables["params"].items() if k != "sibling"}
    output = head.apply({"params": without}, pool, boxes, False)
    assert output.sibling is None
    assert output.logits.shape == (1, 2, 4) and output.deltas.shape == (1, 2, 3, 4)


def test_shift_of_the_region_is_a_fraction_of_its_size():
    moved = shifted(jnp.array([[[10.0, 10.0, 30.0, 50.0]]]), jnp.array([[[0.1, -0.2]]]))
    np.testing.assert_allclose(moved, [[[12.0, 2.0, 32.0, 42.0]]], rtol=1e-6)


def test_unknown_offset_init_is_named(scene):
    with pytest.raises(UserError, match="offset_init: found 'big', expected one of small"):
        DecouplingHead(Softmax(3), offset_init="big").init(jax.random.key(0), *scene, True)
