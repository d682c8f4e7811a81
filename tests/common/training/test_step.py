"""The training step is one program whatever the schedule, and its state is optax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

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
