"""The training step is one program whatever the schedule, and its state is optax's; its sums."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.nn import parts
from common.training import distributed
from common.training.optimizer import make_optimizer, make_schedule
from common.training.step import init_state, jit_train_step, scheduled
from tests.common.training.test_optimizer import config

SHAPES = {"image": jax.ShapeDtypeStruct((2, 3), jnp.float32)}


class Slope(nn.Module):
    """The smallest thing that a step can train."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch, train):
        del train
        return {"losses": {"square": jnp.square(nn.Dense(1)(batch["image"])).sum()}, "monitor": {}}


def make(cfg):
    model, mesh = Slope(distributed.DATA_AXIS), distributed.make_mesh(jax.devices()[:1])
    params = jax.eval_shape(lambda: init_state(model, optax.sgd(1.0), 0, SHAPES)).params
    tx = make_optimizer(cfg, params)
    state = jax.jit(lambda: init_state(model, tx, 0, SHAPES))()
    return model, mesh, tx, jax.device_put(state, distributed.replicated(mesh))


def test_schedules_share_the_compiled_step():
    texts, ends = [], []
    for changes in ({}, dict(num_epochs=26, decay_epochs=(1, 2), learning_rate_per_image=0.01)):
        cfg = config(warmup_epochs=0.0, **changes)
        model, mesh, tx, state = make(cfg)
        step = jit_train_step(model, tx, mesh)
        schedule = make_schedule(cfg, batch_size=2, steps_per_epoch=1)
        batch = {"image": jnp.ones((2, 3))}
        texts.append(step.lower(state, batch, schedule(0)).as_text())
        run = scheduled(step, schedule, mesh)
        for _ in range(3):
            state, _ = run(state, batch)
        ends.append(jax.device_get(state.params))
        assert step._cache_size() == 1, "another rate compiled the step again"
    assert texts[0] == texts[1]
    kernels = [end["Dense_0"]["kernel"] for end in ends]
    assert not np.array_equal(*kernels)


def test_rates_given_equal_those_of_optax_and_so_does_the_state():
    """Checkpoints of the state go on: it is what `optax.scale_by_learning_rate` keeps."""
    cfg = config(clip_norm=0.0, weight_decay=0.0)
    schedule = make_schedule(cfg, batch_size=2, steps_per_epoch=2)
    theirs = optax.chain(
        *(optax.identity(), optax.add_decayed_weights(0.0), optax.trace(decay=cfg.momentum)),
        optax.scale_by_learning_rate(schedule),
    )
    params = {"kernel": np.linspace(-1, 1, 5, dtype=np.float32)}
    ours = make_optimizer(cfg, params)
    states, values = [ours.init(params), theirs.init(params)], [params, params]
    for step in range(30):
        updates, states[0] = ours.update(
            values[0], states[0], values[0], learning_rate=schedule(step)
        )
        values[0] = optax.apply_updates(values[0], updates)
        updates, states[1] = theirs.update(values[1], states[1], values[1])
        values[1] = optax.apply_updates(values[1], updates)
    np.testing.assert_array_equal(values[0]["kernel"], values[1]["kernel"])
    inner = states[0].inner_states["trained"].inner_state
    assert jax.tree.map(jnp.shape, inner[-1]) == jax.tree.map(jnp.shape, states[1][-1])
    assert isinstance(inner[-1], optax.ScaleByScheduleState) and int(inner[-1].count) == 30


class Normalised(nn.Module):
    """Computes in bfloat16, averages statistics and counts over the batch."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch, train):
        x = nn.Dense(8, dtype=jnp.bfloat16)(batch["image"])
        norm = nn.BatchNorm(not train, dtype=jnp.bfloat16, axis_name=self.axis_name)
        x = nn.Dense(3, dtype=jnp.bfloat16)(nn.relu(norm(x))).astype(jnp.float32)
        count = parts.sum_over_batch((batch["image"] > 0).sum(), self.axis_name)
        return {"losses": {"square": jnp.square(x).sum() / count}, "monitor": {"count": count}}


def normalised_step(reduce_dtype: str):
    """The step on all devices, with no more than its rate between gradients and parameters."""
    model, mesh = Normalised(distributed.DATA_AXIS), distributed.make_mesh()
    tx = optax.sgd(1.0)
    state = jax.jit(lambda: init_state(model, tx, 0, SHAPES))()
    batch = {"image": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
    return jit_train_step(model, tx, mesh, reduce_dtype=reduce_dtype), state, batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_alone_are_summed_in_the_dtype_that_is_asked_for(dtype):
    step, state, batch = normalised_step(dtype)
    text = step.trace(state, batch, 1.0).lower(lowering_platforms=("tpu",)).as_text()
    sums = re.findall(r"stablehlo.all_reduce.*?}\) : \(tensor<([^>]*)>\)", text, re.DOTALL)
    gradients = ["x".join(map(str, x.shape)) for x in jax.tree.leaves(state.params)]
    rounded = [s for s in sums if s.endswith("bf16")]
    expected = [f"{shape}xbf16" for shape in gradients] if dtype == "bfloat16" else []
    assert sorted(rounded) == sorted(expected)
    others = [s for s in sums if s not in rounded]
    # The statistics' means and the way back through them, losses, and the count.
    assert {"f32", "i32"} <= set(others) and all(s.endswith(("f32", "i32")) for s in others)


def test_a_step_with_rounded_sums_is_that_without_up_to_their_rounding():
    ends = {}
    for dtype in ("float32", "bfloat16"):
        step, state, batch = normalised_step(dtype)
        before = jax.device_get(state.params)
        state, metrics = step(state, batch, 1.0)
        ends[dtype] = jax.device_get((state, metrics))
    (exact, exact_metrics), (rounded, metrics) = ends.values()
    changes = zip(*map(jax.tree.leaves, (before, exact.params, rounded.params)), strict=True)
    errors = [np.abs(b - c).max() / np.abs(a - b).max() for a, b, c in changes]
    assert 0 < max(errors) < 2**-6, errors  # eight bits, of the parts and of the sum
    for a, b in zip(*(jax.tree.leaves(s.batch_stats) for s in (exact, rounded)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["loss"] == exact_metrics["loss"] and metrics["count"] == exact_metrics["count"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(rounded.params))


class Product(nn.Module):
    """A gradient that is the sum of the images."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch, train):
        del train
        weight = self.param("weight", nn.initializers.ones, ())
        return {"losses": {"product": (weight * batch["image"]).sum()}, "monitor": {}}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "devices", "gradient"),
    [
        ("float32", 2, 259),
        ("bfloat16", 2, 258),  # 256 + 1 is rounded to 256; had 1 + 1 + 1 been added one by one: 260
        ("bfloat16", 1, 259),
    ],
)
def test_parts_are_rounded_once_for_the_sum(accumulate, dtype, devices, gradient):
    model, mesh = Product(distributed.DATA_AXIS), distributed.make_mesh(jax.devices()[:devices])
    tx = optax.sgd(1.0)
    state = jax.jit(lambda: init_state(model, tx, 0, SHAPES))()
    batch = {"image": np.array([256, 1, 1, 1], np.float32)}
    state, metrics = jit_train_step(model, tx, mesh, accumulate, dtype)(state, batch, 1.0)
    assert float(state.params["weight"]) == 1 - gradient
    assert float(metrics["loss"]) == 259 and float(metrics["gradient_norm"]) == gradient
