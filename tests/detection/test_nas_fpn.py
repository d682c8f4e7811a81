"""NAS-FPN: the published graph, any canvas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detection.models.nas_fpn import CELL, NASFPN, NUM_LEVELS, attend, resample


def taps(height=64, width=96):
    return {
        f"c{level}": jnp.ones((1, -(-height // 2**level), -(-width // 2**level), level))
        for level in (2, 3, 4, 5)
    }


@pytest.mark.parametrize(("min_level", "names"), [(3, "34567"), (2, "23456")])
def test_five_levels_of_one_width(min_level, names):
    neck = NASFPN(8, repeats=2, min_level=min_level)
    levels, _ = jax.eval_shape(
        lambda x: neck.init_with_output(jax.random.key(0), x, False), taps(800, 1344)
    )
    assert list(levels) == [f"p{name}" for name in names]
    for name, level in levels.items():
        stride = 2 ** int(name[1:])
        assert level.shape == (1, -(-800 // stride), -(-1344 // stride), 8)


def test_every_output_is_made_and_every_node_is_used():
    assert sorted(m.level for m in CELL if m.is_output) == list(range(NUM_LEVELS))
    used = {i for m in CELL for i in (m.first, m.second, *m.beside)}
    outputs = {NUM_LEVELS + i for i, m in enumerate(CELL) if m.is_output}
    assert used | outputs == set(range(NUM_LEVELS + len(CELL)))


def test_attention_adds_the_other_map_weighted_by_the_maximum_of_the_gate():
    x = np.arange(8.0).reshape(1, 2, 2, 2)
    gate = -x
    strongest = np.array([0.0, -1.0])
    expected = gate + x / (1 + np.exp(-strongest))
    np.testing.assert_allclose(attend(jnp.array(x), jnp.array(gate)), expected, rtol=1e-6)


def test_resampling_repeats_and_takes_maxima():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    up = resample(x, -1, (3, 5))[0, :, :, 0]
    np.testing.assert_array_equal(up, [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]])
    np.testing.assert_array_equal(resample(x, 1, (1, 2))[0, :, :, 0], [[4, 5]])


def test_gradients_reach_every_parameter():
    neck = NASFPN(4, repeats=1, norm="group")
    inputs = taps(256, 384)  # the coarsest level still has several cells to normalise over
    variables = jax.jit(neck.init, static_argnums=2)(jax.random.key(0), inputs, True)

    def loss(params):
        levels = neck.apply({"params": params}, inputs, True)
        noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), levels)
        return sum((levels[name] * noise[name]).sum() for name in levels)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
