"""Parts one after another give what the whole batch gives, in either way of adding them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from common.nn import parts
from common.training import distributed
from common.training.accumulation import summed_over_parts

DATA = distributed.DATA_AXIS


def losses(weight, batch):
    """A loss normalised by one count over the batch, and another one by a second."""
    positive = batch["x"] > 0
    residual = jnp.where(positive, weight * batch["x"] - batch["y"], 0.0)
    numbers = parts.image_numbers(len(batch["x"]), DATA)
    count = jnp.maximum(parts.sum_over_batch(positive.sum(), DATA), 1)
    total = parts.sum_over_batch(batch["y"].sum(), DATA)
    value = jnp.square(residual).sum() / count + (weight * numbers * batch["x"]).sum() / total
    return value, (numbers * batch["x"]).sum()


def compute(batch, num_devices, count, in_order):
    def device(weight, batch):
        def gradients(part):
            (value, checked), grad = jax.value_and_grad(losses, has_aux=True)(weight, part)
            return (value, grad, checked), part["y"].mean()

        summed, averaged = summed_over_parts(
            gradients, lambda part: losses(weight, part), batch, count, in_order=in_order
        )
        return summed, jax.lax.pmean(averaged, DATA)

    mesh = distributed.make_mesh(jax.devices()[:num_devices])
    specs = dict(in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False)
    return jax.device_get(jax.jit(jax.shard_map(device, mesh=mesh, **specs))(2.0, batch))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("num_devices", "count"), [(1, 2), (1, 8), (2, 4), (4, 3)])
def test_parts_equal_the_whole_batch(num_devices, count, in_order):
    if jax.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices, this process has {jax.device_count()}")
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(1, 1, 24).astype(np.float32) for name in ("x", "y")}
    whole = compute(batch, 1, 1, in_order=True)
    result = compute(batch, num_devices, count, in_order)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, whole)
