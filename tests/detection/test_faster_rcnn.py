"""The detector learns, ignores padding, and gives the same gradient on any number of devices."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from common.io.errors import UserError
from common.training.step import init_state, init_variables, make_predict_step, make_train_step
from detection.models.faster_rcnn import build
from tests import tiny


def make_batch(num_images: int = 4) -> dict[str, np.ndarray]:
    """Squares whose colour is their class."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(90, 130, (num_images, 64, 64, 3)).astype(np.uint8),
        "image_size": np.full((num_images, 2), 64, np.float32),
        "image_valid": np.ones(num_images, bool),
        "gt_boxes": np.zeros((num_images, 8, 4), np.float32),
        "gt_classes": np.zeros((num_images, 8), np.int32),
        "gt_valid": np.zeros((num_images, 8), bool),
    }
    for i in range(num_images):
        for j in range(2):
            class_ = (i + j) % 3
            x, y = rng.integers(0, 12) + 32 * j, rng.integers(0, 40)
            batch["image"][i, y : y + 18, x : x + 18] = tiny.COLOURS[class_]
            batch["gt_boxes"][i, j] = [x, y, x + 18, y + 18]
            batch["gt_classes"][i, j] = class_
            batch["gt_valid"][i, j] = True
    return batch


def make_state(model, tx):
    return init_state(model, tx, 0, tiny.init_shapes())


def make_variables(model):
    return jax.jit(lambda: init_variables(model, 0, tiny.init_shapes()))()


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def config():
    return tiny.settings()


@pytest.mark.slow
def test_it_learns_to_find_and_name_what_it_is_shown(config):
    model, mesh = build(config.model, 3, "data"), mesh_of(1)
    rate = optax.cosine_decay_schedule(1e-3, 170)
    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(rate))
    state = jax.jit(lambda: make_state(model, tx))()
    step = jax.jit(make_train_step(model, tx, mesh))
    batch = make_batch()
    accuracies = []
    for _ in range(170):
        state, metrics = step(state, batch)
        accuracies.append(metrics["positive_accuracy"])
    # Each step samples other regions: one mistake in a step of 16 positives is 0.94.
    assert np.mean(accuracies[-20:]) > 0.95
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = jax.tree.map(np.asarray, jax.jit(make_predict_step(model, mesh))(variables, batch))
    for i in range(4):
        for j in range(2):
            right = found["valid"][i] & (found["classes"][i] == batch["gt_classes"][i, j])
            offsets = np.abs(found["boxes"][i][right] - batch["gt_boxes"][i, j]).max(axis=1)
            assert found["scores"][i][right][np.argmin(offsets)] > 0.5
            assert offsets.min() < 4, "within four pixels of the truth"


def test_padded_images_and_boxes_change_nothing(config):
    model = build(config.model, 3)
    variables = make_variables(model)
    streams = {"sampling": jax.random.key(5), "dropout": jax.random.key(6)}

    @jax.jit
    def losses(variables, batch):
        out, _ = model.apply(variables, batch, train=True, rngs=streams, mutable=["batch_stats"])
        return out["losses"]

    batch = make_batch(2)
    expected = losses(variables, batch)
    padded = {k: np.concatenate([v, v]) for k, v in batch.items()}
    padded["image_valid"][2:] = False
    padded["image"][2:] = 255
    padded["gt_boxes"][~padded["gt_valid"]] = 1e6
    for name, value in losses(variables, padded).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_image_without_objects_gives_finite_losses_and_gradients(config):
    model = build(config.model, 3)
    variables = make_variables(model)
    batch = make_batch(2)
    batch["gt_valid"][:] = False

    def loss(params):
        losses = tiny.losses(model, {**variables, "params": params}, batch)
        return sum(losses.values()), losses

    grads, terms = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert terms["box_regression"] == 0 and terms["rpn_box"] == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("norm", ["group", "sync"])
def test_four_devices_compute_what_one_computes(config, norm):
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, this process has {jax.device_count()}")
    settings = dataclasses.replace(config.model, norm=norm)
    batch, results = make_batch(4), []
    for count in (1, 4):
        model = build(settings, 3, "data")
        tx = optax.sgd(0.1)
        state = jax.jit(lambda model=model, tx=tx: make_state(model, tx))()
        step = jax.jit(make_train_step(model, tx, mesh_of(count)))
        results.append(jax.device_get(step(state, batch)))
    (one, one_metrics), (four, four_metrics) = results
    for name, value in one_metrics.items():
        np.testing.assert_allclose(four_metrics[name], value, rtol=2e-4, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, four.params)
    assert max(jax.tree.leaves(moved)) < 1e-4


def test_two_devices_compute_part_by_part_what_four_compute(config):
    """Losses are normalised over the whole batch, random choices follow the image."""
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, this process has {jax.device_count()}")
    model, tx = build(dataclasses.replace(config.model, norm="group"), 3, "data"), optax.sgd(0.1)
    state = jax.jit(lambda: make_state(model, tx))()
    results = []
    for count in (4, 2):
        step = jax.jit(make_train_step(model, tx, mesh_of(count), accumulate=4 // count))
        results.append(jax.device_get(step(state, make_batch(4))))
    (four, four_metrics), (two, two_metrics) = results
    for name, value in four_metrics.items():
        np.testing.assert_allclose(two_metrics[name], value, rtol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), two.params, four.params)
    assert max(jax.tree.leaves(moved)) < 1e-6


def test_parts_are_refused_where_a_norm_needs_the_whole_batch(config):
    settings = dataclasses.replace(config.model, norm="sync")
    assert settings.needs_whole_batch and not config.model.needs_whole_batch
    model, tx = build(settings, 3, "data"), optax.sgd(0.1)
    state = jax.eval_shape(lambda: make_state(model, tx))
    with pytest.raises(UserError, match="accumulate: found 2, expected 1: norm 'sync'"):
        jax.eval_shape(make_train_step(model, tx, mesh_of(1), accumulate=2), state, make_batch(4))


def test_detections_stay_inside_the_content_and_experts_drop_background_regions(config):
    model = build(dataclasses.replace(config.model, drop_background_rois=True), 3, "data")
    variables = make_variables(model)
    batch = make_batch(2)
    batch["image_size"][:] = [40, 50]
    predict = jax.jit(make_predict_step(model, mesh_of(1)))
    classifier = variables["params"]["box_head"]["classifier"]
    classifier["bias"] = classifier["bias"].at[0].set(-1.0)
    found = predict(variables, batch)
    boxes = np.asarray(found["boxes"])[np.asarray(found["valid"])]
    assert len(boxes) and (boxes >= 0).all() and (boxes[:, 2] <= 50).all()
    assert (boxes[:, 3] <= 40).all()
    # Background is the best class everywhere, though the others have 0.17, far above the threshold.
    classifier["bias"] = classifier["bias"].at[0].set(1.0)
    assert not np.asarray(predict(variables, batch)["valid"]).any()
