"""Rows that are absent cost nothing on CPU; what comes out does not depend on how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.xla_cpu.present_rows import map_present


@pytest.mark.parametrize("count", [5, 32, 40])
def test_values_and_gradients_are_those_of_present_rows(count):
    rng = np.random.default_rng(count)
    x, kernel = rng.normal(size=(count, 3)), rng.normal(size=(3, 2))
    scale, shift = rng.normal(size=count), rng.normal(size=2)
    present = np.arange(count) < 7
    present[3] = False

    def mapped(x, kernel, shift):
        layers = [
            (lambda kernel, x, scale: x @ kernel * scale[:, None], kernel),
            (lambda shift, x, scale: jnp.tanh(x) + shift, shift),
        ]
        rows = map_present(layers, present, x, (scale,))
        return rows, (rows**2).sum()

    def plain(x, kernel, shift):
        rows = (jnp.tanh(x @ kernel * scale[:, None]) + shift) * present[:, None]
        return rows, (rows**2).sum()

    results = []
    for function in (mapped, plain):
        rows = jax.jit(function)(x, kernel, shift)[0]
        grads = jax.jit(jax.grad(lambda *a, f=function: f(*a)[1], (0, 1, 2)))(x, kernel, shift)
        results.append((rows, *grads))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(results[0][0])[~present].any()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_compute_all_rows_at_once(platform):
    def total(x, present):
        return map_present([(lambda shift, x: jnp.exp(x) + shift, 1.0)], present, x).sum()

    traced = jax.jit(jax.grad(total)).trace(jnp.ones((64, 4)), jnp.ones(64, bool))
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.while" not in traced.lower(lowering_platforms=(platform,)).as_text()
