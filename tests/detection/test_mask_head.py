"""Mask head: layers, targets and loss equal their twins; what has no mask teaches none."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from common.io.errors import UserError
from common.masks.probability import PROBABILITY_ONE
from common.training.step import init_state, make_train_step, variable_shapes
from detection.batch_fields import init_shapes
from detection.losses.mask import mask_losses, mask_targets
from detection.models.faster_rcnn import build
from detection.models.mask_head import MaskHead
from detection.settings import read_run
from tests import tiny
from tests.detection.test_faster_rcnn import make_batch, mesh_of
from tests.detection.test_variants import TWO_STAGES
from tests.oracles import masks as oracle
from tests.oracles.variables import random_values


def settings_of(kind="class_specific", **fields):
    config = tiny.get_config()
    config.data.mask_size = 0 if kind == "none" else 16
    config.model.update(fields)
    config.model.mask_head.update(kind=kind, width=8, num_convs=2)
    return read_run(config)


def with_masks(batch):
    """The batch with discs as masks: of all but each image's second object."""
    y, x = np.mgrid[:16, :16] - 7.5
    disc = np.packbits(y**2 + x**2 < 50, axis=1)
    shape = batch["gt_valid"].shape
    has_mask = batch["gt_valid"] & (np.arange(shape[1]) != 1)
    masks = np.where(has_mask[..., None, None], disc, np.uint8(0))
    return {**batch, "gt_masks": masks, "gt_has_mask": has_mask}


# ------------------------------------------------------------------------------------------------
# Layers, targets and loss
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_masks", [4, 1])
def test_logits_are_those_of_the_class_in_the_twin(num_masks):
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
    classes = np.array([[2, 0, 3], [3, 1, 1]])
    present = np.array([[True, True, False], [True, False, True]])
    head = MaskHead(num_masks, width=5, num_convs=2)
    params = head.init(jax.random.key(0), pooled, classes, present)["params"]
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([0.5 * rng.normal(size=leaf.shape) for leaf in leaves])
    layers = {name: (layer["kernel"], layer["bias"]) for name, layer in params.items()}
    convs = [layers["conv1"], layers["conv2"]]
    everything = oracle.head_logits(
        pooled.reshape(-1, 4, 4, 3), convs, layers["deconv"], layers["predictor"]
    )
    found = head.apply({"params": params}, pooled, classes, present)
    assert found.shape == (2, 3, 8, 8) and not found[~present].any()
    columns = np.minimum(classes.reshape(-1), num_masks - 1)
    expected = np.stack([x[..., c] for x, c in zip(everything, columns, strict=True)])
    found, present = np.asarray(found).reshape(-1, 8, 8), present.reshape(-1)
    np.testing.assert_allclose(found[present], expected[present], rtol=1e-4, atol=1e-5)


def test_targets_are_what_the_object_covers_of_each_pixel():
    rng = np.random.default_rng(1)
    masks = rng.random((2, 3, 16, 16)) < 0.5
    masks[:, 0] = True
    gt_boxes = np.array([[10, 20, 58, 44], [0, 0, 16, 16], [5, 5, 9, 41.5]], np.float32)
    matched_idx = np.array([[0, 1, 2, 1, 0, 0], [2, 2, 0, 1, 1, 0]])
    matched = gt_boxes[matched_idx]
    rois = matched + rng.uniform(-6, 6, matched.shape).astype(np.float32)
    rois[0, 4] = gt_boxes[0]  # the box itself
    rois[0, 5] = [100, 100, 140, 120]  # elsewhere
    rois[1, 5] = [30, 30, 30, 40]  # nowhere
    found = jax.jit(mask_targets, static_argnums=4)(
        np.packbits(masks, axis=-1), matched, matched_idx, rois, 8
    )
    for b, r in np.ndindex(matched_idx.shape):
        mask = masks[b, matched_idx[b, r]]
        expected = oracle.target(mask, matched[b, r], rois[b, r], 8)
        # Of random pixels, a half is often covered to the last bit.
        wrong = found[b, r] != expected
        assert wrong.mean() < 0.04, (b, r)
    assert found[0, 4].all() and not found[0, 5].any() and not found[1, 5].any()


def test_loss_is_the_mean_over_counted_masks_and_others_get_no_gradient():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    targets = rng.random(logits.shape) < 0.5
    counted = np.array([[True, False, True, False], [False, False, True, False]])
    logits[~counted] = np.inf

    def loss(logits, counted):
        return mask_losses(logits, targets, counted)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, iou), gradient = grad(logits, counted)
    np.testing.assert_allclose(value, oracle.loss(logits, targets, counted), rtol=1e-5)
    found = logits[counted] > 0
    union = (found | targets[counted]).sum((1, 2))
    expected = (found & targets[counted]).sum((1, 2)) / union
    np.testing.assert_allclose(iou, expected.mean(), rtol=1e-5)
    probability = 1 / (1 + np.exp(-logits[counted].astype(np.float64)))
    np.testing.assert_allclose(
        gradient[counted], (probability - targets[counted]) / 3 / 36, rtol=1e-4, atol=1e-8
    )
    assert not gradient[~counted].any()
    (value, iou), gradient = grad(logits, np.zeros_like(counted))
    assert value == 0 and iou == 0 and not gradient.any()


# ------------------------------------------------------------------------------------------------
# In the detector
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    """Model, state before the first step, and jitted train steps on one and on two devices."""
    settings = settings_of()
    model, tx = build(settings.model, 3, "data"), optax.sgd(0.1)
    shapes = init_shapes(settings.data)
    state = jax.eval_shape(lambda: init_state(model, tx, 0, shapes))
    params = random_values(state.params)
    key = np.array(jax.random.key_data(jax.random.key(0)))
    state = state.replace(step=np.int32(0), key=key, params=params, opt_state=tx.init(params))
    steps = {n: jax.jit(make_train_step(model, tx, mesh_of(n))) for n in (1, 2)}
    return model, state, steps


def mask_gradient(before, after):
    """The largest move of any parameter of the mask head in a step."""
    heads = (jax.tree.leaves(state.params["mask_head"]) for state in (before, after))
    return [np.abs(a - b).max() for a, b in zip(*heads, strict=True)]


def test_only_objects_with_masks_teach(detector):
    _, state, steps = detector
    batch = with_masks(make_batch(2))

    def masked(**fields):
        after, metrics = steps[1](state, batch | fields)
        return mask_gradient(state, after), metrics

    moves, metrics = masked()
    assert metrics["loss/mask"] > 0.1 and min(moves) > 0
    # What is written where no mask is changes nothing.
    other = batch["gt_masks"].copy()
    other[~batch["gt_has_mask"]] = 255
    assert masked(gt_masks=other)[1]["loss/mask"] == metrics["loss/mask"]
    # An image without masks beside one that has some counts no RoI.
    without = batch["gt_has_mask"] & [[True], [False]]
    np.testing.assert_allclose(
        masked(gt_has_mask=without)[1]["loss/mask"],
        masked(image_valid=np.array([True, False]))[1]["loss/mask"],
        rtol=1e-5,
    )
    moves, metrics = masked(gt_has_mask=np.zeros_like(without))
    assert metrics["loss/mask"] == 0 and metrics["loss/box_class"] > 0 and max(moves) == 0


def test_two_devices_compute_what_one_computes(detector):
    if jax.device_count() < 2:
        pytest.skip(f"needs 2 devices, this process has {jax.device_count()}")
    _, state, steps = detector
    batch = with_masks(make_batch(2))
    batch["gt_has_mask"][1, 1] = True  # other numbers of masks on the two devices
    (one, one_metrics), (two, two_metrics) = (
        jax.device_get(step(state, batch)) for step in steps.values()
    )
    assert one_metrics["loss/mask"] > 0 and one_metrics["mask_iou"] > 0
    for name, value in one_metrics.items():
        np.testing.assert_allclose(two_metrics[name], value, rtol=2e-4, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, two.params)
    assert max(jax.tree.leaves(moved)) < 1e-4


def test_detections_have_the_masks_that_their_boxes_are_given(detector):
    model, state, _ = detector
    batch = make_batch(2)
    batch["image_valid"][1] = False

    @jax.jit
    def detect(variables):
        found = model.apply(variables, batch, train=False)
        given = (found[name] for name in ("boxes", "classes", "valid"))
        return found, model.apply(variables, batch, *given, method="predict_masks")

    found, again = detect(state.variables)
    assert found["masks"].shape == (2, 20, 28, 28) and found["masks"].dtype == np.uint16
    np.testing.assert_array_equal(found["masks"], again)
    assert found["valid"][0].any() and not found["masks"][~found["valid"]].any()
    share = found["masks"][found["valid"]] / PROBABILITY_ONE
    assert 0 <= share.min() < share.mean() < share.max() <= 1


@pytest.mark.parametrize(
    ("stages", "fields", "heads", "terms"),
    [
        ("last", dict(split_after="c3"), {"mask_head"}, {"mask"}),
        (
            "all",
            dict(box_head=dict(kind="decoupling"), dtype="bfloat16"),
            {"mask_head", "mask_head2"},
            {"mask_stage1", "mask_stage2"},
        ),
    ],
)
def test_cascades_train_masks_in_the_last_or_in_every_stage(stages, fields, heads, terms):
    settings = settings_of("class_agnostic", stages=TWO_STAGES, **fields)
    mask_head = dataclasses.replace(settings.model.mask_head, stages=stages)
    model = build(dataclasses.replace(settings.model, mask_head=mask_head), 3)
    shapes = variable_shapes(model, init_shapes(settings.data))
    assert {name for name in shapes["params"] if name.startswith("mask")} == heads
    assert shapes["params"]["mask_head"]["predictor"]["kernel"].shape == (8, 1)
    batch = with_masks(make_batch(2))
    losses = jax.eval_shape(lambda v: tiny.losses(model, v, batch), shapes)
    assert {name for name in losses if name.startswith("mask")} == terms
    assert all(losses[name].dtype == np.float32 for name in terms)
    found = jax.eval_shape(lambda v: model.apply(v, batch, train=False), shapes)
    assert found["masks"].shape == (2, 20, 28, 28)


def test_without_a_mask_head_there_are_no_masks():
    settings = settings_of("none")
    model = build(settings.model, 3)
    shapes = variable_shapes(model, init_shapes(settings.data))
    found = jax.eval_shape(lambda v: model.apply(v, make_batch(1), train=False), shapes)
    assert "mask_head" not in shapes["params"] and "masks" not in found


def test_settings_that_contradict_each_other_are_named():
    config = tiny.get_config()
    config.model.mask_head.kind = "class_agnostic"
    with pytest.raises(UserError, match="data.mask_size: found 0, expected a multiple of 8 such"):
        read_run(config)
    config.model.mask_head.kind = "none"
    config.data.mask_size = 112
    with pytest.raises(UserError, match="data.mask_size: found 112, expected 0: model.mask_head"):
        read_run(config)
    config.data.mask_size = 12
    with pytest.raises(UserError, match="mask_size: found 12, expected 0 .no masks. or a positive"):
        read_run(config)
    config = tiny.get_config("refine")
    config.data.mask_size = 16
    config.model.mask_head.kind = "class_agnostic"
    with pytest.raises(UserError, match="mask_head.kind: found 'class_agnostic', expected 'none'"):
        read_run(config)
