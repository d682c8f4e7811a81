import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.layers.enlarge import enlarge


@pytest.mark.parametrize(("shape", "factor"), [((2, 3, 5, 4), 2), ((1, 1, 2, 3), 8)])
def test_values_and_gradients_are_those_of_resize(shape, factor):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    size = (shape[0], factor * shape[1], factor * shape[2], shape[3])
    weights = rng.normal(size=size).astype(np.float32)

    def resize(x):
        return jax.image.resize(x, size, "bilinear", antialias=False)

    np.testing.assert_allclose(enlarge(x, factor), resize(x), atol=1e-6)
    found, expected = (
        jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x)
        for f in (lambda x: enlarge(x, factor), resize)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_type_stays():
    x = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    assert enlarge(x, 2).dtype == jnp.bfloat16
    assert jax.grad(lambda x: enlarge(x, 2).sum())(x).dtype == jnp.bfloat16
