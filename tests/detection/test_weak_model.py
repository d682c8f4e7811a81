"""The weak head in a detector: what steps of boxes and of labels teach, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.io.errors import UserError
from common.training.step import init_state, make_train_step
from detection import batch_fields
from detection.models.faster_rcnn import build
from detection.settings import read_run
from tests import tiny
from tests.detection.test_faster_rcnn import make_batch, mesh_of


def weak_config(feature_gradient: float = 1.0, **changes):
    """The tiny detector with a weak head, whose class loss keeps a state; `changes` to how boxes
    are mined."""
    config = tiny.get_config("weak")
    config.model.weak.feature_gradient = feature_gradient
    config.model.box_head.classifier.kind = "seesaw"
    config.model.weak.mining.update(**changes)
    return config


def weak_batch(num_images: int = 4, boxes: bool = True) -> dict[str, np.ndarray]:
    batch = make_batch(num_images)
    batch["labels"] = np.full((num_images, 3), -1, np.int8)
    for image in range(num_images):
        batch["labels"][image, batch["gt_classes"][image, :2]] = 1
    names = batch_fields.label_shapes(read_run(weak_config()).data, 1, 3)
    return batch if boxes else {name: batch[name] for name in names}


def make_step(config, devices: int, accumulate: int = 1, rate: float = 0.1):
    model = build(read_run(config).model, 3, "data", ancestors=((), (), ()))
    tx, shapes = optax.sgd(rate), batch_fields.init_shapes(read_run(config).data)
    state = jax.jit(lambda: init_state(model, tx, 0, shapes))()
    return state, jax.jit(make_train_step(model, tx, mesh_of(devices), accumulate))


@pytest.fixture(scope="module")
def one_device():
    return make_step(weak_config(), 1)


def test_a_step_of_labels_teaches_no_proposals_and_mines_what_is_there(one_device):
    state, step = one_device
    after, metrics = step(state, weak_batch(boxes=False))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params)
    assert max(jax.tree.leaves(moved["rpn_head"])) == 0
    for name in ("weak_head", "box_head", "backbone", "neck"):
        assert max(jax.tree.leaves(moved[name])) > 0, name
    assert metrics["mined_per_image"] == 2  # the two classes of each image, none that is absent
    assert {"loss/weak", "loss/weak_refinement", "loss/mined_box_class"} <= metrics.keys()
    assert int(after.loss_state["weak_steps"]) == 1
    assert not after.loss_state["box_class"]["counts"].any()
    after, metrics = step(after, weak_batch())
    assert int(after.loss_state["weak_steps"]) == 2
    counts = after.loss_state["box_class"]["counts"]
    assert counts.all()
    again, _ = step(after, weak_batch(boxes=False))
    np.testing.assert_array_equal(again.loss_state["box_class"]["counts"], counts)
    assert {"loss/weak", "loss/rpn_class", "mined_right"} <= metrics.keys()
    nothing = weak_batch(boxes=False)
    nothing["image_valid"][:] = False
    _, metrics = step(state, nothing)
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0


def test_a_share_of_the_gradient_of_the_head_reaches_the_features():
    moved = {}
    for share in (1.0, 0.25, 0.0):  # mined boxes do not count yet
        config = weak_config(share, start_steps=1)
        state, step = make_step(config, 1)
        after, _ = step(state, weak_batch(boxes=False))
        moved[share] = jax.tree.map(lambda a, b: np.asarray(a - b), after.params, state.params)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[1.0]["backbone"])) > 0
    for part, share in (("weak_head", 1.0), ("neck", 0.25), ("backbone", 0.25)):
        for whole, less in zip(
            *(jax.tree.leaves(moved[g][part]) for g in (1.0, 0.25)), strict=True
        ):
            np.testing.assert_allclose(less, share * whole, rtol=1e-3, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[0.0]["weak_head"])) > 0
    assert not any(
        x.any() for part in ("neck", "backbone") for x in jax.tree.leaves(moved[0.0][part])
    )


def test_mined_boxes_are_moved_by_the_box_heads():
    plain, moving = (
        build(read_run(weak_config(refine=refine)).model, 3, ancestors=((), (), ()))
        for refine in (False, True)
    )
    batch = weak_batch(2)

    @jax.jit
    def run(key):
        variables = plain.init({"params": key, "sampling": key}, batch, method="losses")
        mined, moved = (model.apply(variables, batch, method="detect") for model in (plain, moving))
        heads = plain.apply(
            variables, batch, mined["boxes"], mined["valid"], method="score_proposals"
        )
        return mined, moved, heads["boxes"]

    mined, moved, boxes = jax.device_get(run(jax.random.key(0)))
    for name in ("classes", "scores", "valid"):
        np.testing.assert_array_equal(moved[name], mined[name])
    assert mined["valid"].sum() == 4
    expected = np.take_along_axis(boxes, mined["classes"][..., None, None], axis=2)[:, :, 0]
    valid = mined["valid"]
    np.testing.assert_allclose(moved["boxes"][valid], expected[valid], atol=1e-4)
    assert np.abs(moved["boxes"] - mined["boxes"])[valid].max() > 0


def test_mined_boxes_wait_for_their_ramp():
    state, step = make_step(weak_config(start_steps=1, ramp_steps=2), 1, rate=0.0)
    losses = []
    for _ in range(4):
        state, metrics = step(state, weak_batch(boxes=False))
        losses.append(float(metrics["loss/mined_box_class"]))
    assert losses[0] == 0 and losses[1] > 0
    # Regions are sampled anew in each step.
    assert losses[1] < 0.75 * losses[2] and abs(losses[3] / losses[2] - 1) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("boxes", [True, False])
def test_devices_and_parts_do_not_change_a_step(one_device, boxes):
    if jax.device_count() < 2:
        pytest.skip(f"needs 2 devices, this process has {jax.device_count()}")
    batch = weak_batch(boxes=boxes)
    batch["image_valid"][1] = False  # uneven counts on the devices
    results = []
    for state, step in (one_device, make_step(weak_config(), 2), make_step(weak_config(), 1, 2)):
        results.append(step(state, batch))
    (state, metrics), *others = results
    for other_state, other in others:
        assert metrics.keys() == other.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
        for a, b in zip(*map(jax.tree.leaves, (state.params, other_state.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_labels=False), "data.image_labels: found False, expected True"),
        (dict(label_steps=dict(share=1.5, canvas=())), "label_steps.share: found 1.5"),
        (dict(label_steps=dict(share=0.5, canvas=(64,))), "label_steps.canvas: found"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    config = weak_config()
    config.data.update(change)
    with pytest.raises(UserError, match=message):
        read_run(config)


@pytest.mark.parametrize("value", [0.5, 0.9])
def test_background_near_mined_boxes_has_to_be_some(value):
    with pytest.raises(UserError, match=rf"background_iou: found {value}, expected .* \[0, 0.5\)"):
        read_run(weak_config(background_iou=value))


def test_a_softmax_over_one_class_is_refused_and_mining_in_the_warm_up_noted():
    config = weak_config(start_steps=3)
    settings = read_run(config)
    settings.check_classes(2)
    with pytest.raises(UserError, match="found 'softmax' with one class, expected 'sigmoid'"):
        settings.check_classes(1)
    config.model.weak.class_stream = "sigmoid"
    read_run(config).check_classes(1)
    assert "from step 3 of both kinds on, the warm-up ends with step 4" in settings.mining_note(8)
    assert settings.mining_note(6) == ""
    assert tiny.settings().mining_note(8) == ""


def test_label_steps_need_the_head_and_refiners_have_none():
    config = weak_config()
    config.model.weak.kind = "none"
    with pytest.raises(UserError, match="label_steps.share: found 0.5, expected 0"):
        read_run(config)
    config = tiny.get_config("refine")
    config.model.weak.kind = "wsddn"
    with pytest.raises(UserError, match="weak.kind: found 'wsddn', expected 'none'"):
        read_run(config)
