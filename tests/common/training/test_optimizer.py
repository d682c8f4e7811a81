import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.io.errors import UserError
from common.io.settings import read_settings
from common.training.optimizer import (
    OptimizerSettings,
    make_optimizer,
    make_schedule,
    total_steps,
    trained_mask,
    warmup_note,
)
from configs.segmentation import hrnet_w48_256


def config(**changes) -> OptimizerSettings:
    fields = dict(
        learning_rate=0.0,
        learning_rate_per_image=0.002,
        warmup_start=0.001,
        warmup_epochs=1.0,
        warmup_steps=0,
        num_epochs=13,
        num_steps=0,
        decay="step",
        decay_epochs=(9, 11),
        decay_factor=0.1,
        power=0.9,
        momentum=0.9,
        weight_decay=1e-4,
        clip_norm=35.0,
        accumulate=1,
        reduce_dtype="float32",
    )
    return read_settings(OptimizerSettings, fields | changes, "config.optimizer")


def toy_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "backbone": {"conv1": {"kernel": (3, 3, 2, 4)}, "norm1": {"scale": (4,), "bias": (4,)}},
        "head": {"kernel": (4, 3), "bias": (3,)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_schedule_is_the_papers_for_64_accelerators():
    """Warm-up from .001 to .004 * 64 over one epoch, a tenth at epochs 9 and 11."""
    schedule = jax.jit(make_schedule(config(), batch_size=128, steps_per_epoch=100))
    expected = {
        0: 0.001,
        50: (0.001 + 0.256) / 2,
        100: 0.256,
        899: 0.256,
        900: 0.0256,
        1099: 0.0256,
        1100: 0.00256,
        1299: 0.00256,
    }
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7 * 0.256)
    assert total_steps(config(), 100) == 1300


def test_warmup_may_be_given_in_steps_or_left_out():
    schedule = make_schedule(config(warmup_steps=10), batch_size=128, steps_per_epoch=100)
    np.testing.assert_allclose([schedule(5), schedule(10)], [0.1285, 0.256], rtol=1e-6)
    schedule = make_schedule(config(warmup_epochs=0.0), batch_size=128, steps_per_epoch=100)
    np.testing.assert_allclose(schedule(0), 0.256, rtol=1e-6)


def test_warmup_never_starts_above_the_peak():
    schedule = make_schedule(
        config(learning_rate_per_image=0.0001), batch_size=2, steps_per_epoch=100
    )
    np.testing.assert_allclose([schedule(0), schedule(50)], [0.0002, 0.0002], rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate_per_image": 0.0},
        {"num_epochs": 0},
        {"decay_epochs": (11, 9)},
        {"decay_epochs": (9, 9)},
        {"warmup_epochs": -1.0},
        {"decay_factor": 0.0},
    ],
)
def test_impossible_schedules_are_refused_by_field(changes):
    with pytest.raises(UserError, match=f"config.optimizer.{next(iter(changes))}: found"):
        config(**changes)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.1), (-0.1, 0.1), (0.1, -0.1)])
def test_a_config_has_one_learning_rate(rates):
    both = dict(zip(("learning_rate", "learning_rate_per_image"), rates, strict=True))
    with pytest.raises(
        UserError, match="expected one of it and learning_rate .* above 0 and the other one 0"
    ):
        config(**both)


@pytest.mark.parametrize("accelerators", [8, 32, 80])
def test_the_segmenters_rate_is_008_for_any_number_of_accelerators(accelerators):
    """Paper 8.4: "learning rate of 0.08 [...] 6N, 8N, 16N batch [...] N from 8, 32, 80"."""
    fields = hrnet_w48_256.get_config().optimizer
    optimizer = read_settings(OptimizerSettings, fields)
    schedule = make_schedule(optimizer, batch_size=8 * accelerators, steps_per_epoch=100)
    assert float(schedule(0)) == pytest.approx(0.08)
    fields.update(learning_rate=0.0, learning_rate_per_image=0.08 / 64)  # linear scaling
    optimizer = read_settings(OptimizerSettings, fields)
    schedule = make_schedule(optimizer, batch_size=8 * accelerators, steps_per_epoch=100)
    assert float(schedule(0)) == pytest.approx(0.01 * accelerators)


def test_poly_schedule_of_the_segmentation_networks():
    """Paper 8.3: .08 falling with the power .9 of the share that is left, 200k iterations."""
    rates = dict(learning_rate=0.08, learning_rate_per_image=0.0)
    cfg = config(**rates, decay="poly", num_steps=200_000, warmup_epochs=0.0)
    assert total_steps(cfg, 77) == 200_000
    schedule = jax.jit(make_schedule(cfg, batch_size=64, steps_per_epoch=77))
    for step in (0, 1, 50_000, 199_999, 200_000, 200_001):
        expected = 0.08 * max(1 - step / 200_000, 0.0) ** 0.9
        assert float(schedule(step)) == pytest.approx(expected, rel=2e-3, abs=3e-7 * 0.08)
    assert total_steps(config(num_steps=0), 77) == 13 * 77
    for wrong in ({"power": 0.0}, {"num_steps": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            config(**wrong)


@pytest.mark.parametrize("field", ["momentum", "weight_decay", "clip_norm"])
def test_negative_coefficients_are_refused(field):
    with pytest.raises(UserError, match=f"config.optimizer.{field}"):
        config(**{field: -1.0})


def run_ours(cfg, params, gradients, schedule, frozen_pattern=None):
    tx = make_optimizer(cfg, params, frozen_pattern)

    @jax.jit
    def step(params, state, grads, rate):
        updates, state = tx.update(grads, state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for index, grads in enumerate(gradients):
        params, state = step(params, state, grads, schedule(index))
    return jax.device_get(params)


def test_updates_equal_torch_sgd_with_clipping():
    torch = pytest.importorskip("torch", reason="the peer that defines the update")
    cfg, params = config(clip_norm=5.0, weight_decay=0.01), toy_params()
    gradients = [jax.tree.map(lambda x: 3 * x, toy_params(seed)) for seed in range(1, 9)]
    schedule = make_schedule(cfg, batch_size=4, steps_per_epoch=3)
    ours = run_ours(cfg, params, gradients, schedule)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    theirs = [torch.nn.Parameter(torch.tensor(leaf)) for _, leaf in leaves]
    kernels = [p for p, (path, _) in zip(theirs, leaves, strict=True) if path[-1].key == "kernel"]
    others = [p for p, (path, _) in zip(theirs, leaves, strict=True) if path[-1].key != "kernel"]
    sgd = torch.optim.SGD(
        [{"params": kernels, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.9,
    )
    for index, grads in enumerate(gradients):
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        for group in sgd.param_groups:
            group["lr"] = float(schedule(index))
        sgd.step()
    expected = jax.tree.unflatten(treedef, [p.detach().numpy() for p in theirs])
    # torch divides by norm + 1e-6; ours by the norm.
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weight_decay_touches_kernels_only():
    params = toy_params()
    zeros = jax.tree.map(np.zeros_like, params)
    after = run_ours(config(weight_decay=0.1), params, [zeros], lambda _: 1.0)
    np.testing.assert_allclose(after["head"]["kernel"], 0.9 * params["head"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(after["head"]["bias"], params["head"]["bias"])
    np.testing.assert_array_equal(
        after["backbone"]["norm1"]["scale"], params["backbone"]["norm1"]["scale"]
    )


def test_frozen_parameters_stay_and_have_no_momentum():
    params = toy_params()
    pattern = r"backbone/(?:conv1/.*|norm1/scale)"
    after = run_ours(config(), params, [toy_params(1)] * 3, lambda _: 0.1, pattern)
    np.testing.assert_array_equal(
        after["backbone"]["conv1"]["kernel"], params["backbone"]["conv1"]["kernel"]
    )
    assert np.all(after["backbone"]["norm1"]["bias"] != params["backbone"]["norm1"]["bias"])
    tx = make_optimizer(config(), params, pattern)
    state = jax.eval_shape(tx.init, params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == [1, 3, 4, 12]  # the step count, and head bias, norm bias, head kernel


def test_frozen_gradients_do_not_count_for_clipping():
    params = toy_params()
    grads = jax.tree.map(np.zeros_like, params)
    grads["head"]["bias"] = np.array([3.0, 0.0, 4.0], np.float32)
    grads["backbone"]["conv1"]["kernel"] += 1e6
    after = run_ours(
        config(clip_norm=1.0, weight_decay=0.0), params, [grads], lambda _: 1.0, r"backbone/.*"
    )
    np.testing.assert_allclose(
        params["head"]["bias"] - after["head"]["bias"], [0.6, 0.0, 0.8], rtol=1e-5
    )


def test_gradients_apart_are_clipped_by_themselves():
    params = toy_params()
    grads = jax.tree.map(np.zeros_like, params)
    grads["head"]["bias"] = np.array([3.0, 0.0, 4.0], np.float32)
    grads["backbone"]["norm1"]["bias"] += 1e6
    tx = make_optimizer(config(clip_norm=1.0, weight_decay=0.0), params, None, "backbone/.*")
    updates, _ = tx.update(grads, tx.init(params), params, learning_rate=1.0)
    np.testing.assert_allclose(updates["head"]["bias"], [-0.6, 0.0, -0.8], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updates["backbone"]["norm1"]["bias"]), 1, rtol=1e-5)
    alone = make_optimizer(config(), params, None, "no_such_module/.*").init(params)
    together = make_optimizer(config(), params).init(params)
    assert jax.tree.structure(alone) == jax.tree.structure(together)


def test_clipping_can_be_off():
    params = toy_params()
    grads = jax.tree.map(lambda x: 1e4 * x, params)
    after = run_ours(config(clip_norm=0.0, weight_decay=0.0), params, [grads], lambda _: 1e-4)
    np.testing.assert_allclose(after["head"]["bias"], np.zeros(3), atol=1e-5)


def test_the_pattern_must_match_the_whole_path():
    mask = trained_mask(toy_params(), "backbone/conv1")
    assert all(jax.tree.leaves(mask))
    mask = trained_mask(toy_params(), "(?!)")
    assert all(jax.tree.leaves(mask))


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="all parameters are frozen"):
        make_optimizer(config(), toy_params(), ".*")


def test_shapes_are_enough_to_make_the_optimizer():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, toy_params()))
    tx = make_optimizer(config(), shapes)
    assert jax.tree.leaves(jax.eval_shape(tx.init, shapes))


def test_a_run_that_ends_within_its_warm_up_says_so():
    """Recipes for large data sets have warm-ups that small ones never finish."""
    recipe = config(num_epochs=12, warmup_steps=1000)
    assert warmup_note(recipe, steps_per_epoch=100) == ""
    assert "takes 1000 steps, the run has 240" in warmup_note(recipe, steps_per_epoch=20)
    assert warmup_note(config(warmup_epochs=0.0), steps_per_epoch=1) == ""
