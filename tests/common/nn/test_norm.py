"""Normalisation layers: what statistics they use, what they update, what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from common.io.errors import UserError
from common.nn.layers.norm import Norm

EPSILON = 1e-5


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 3, 6)).astype(np.float32)


def variables_for(kind, channels, seed=1):
    rng = np.random.default_rng(seed)
    params = {
        "scale": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        "bias": rng.normal(size=channels).astype(np.float32),
    }
    stats = {
        "mean": rng.normal(size=channels).astype(np.float32),
        "var": rng.uniform(0.5, 1.5, channels).astype(np.float32),
    }
    return {"params": params} if kind == "group" else {"params": params, "batch_stats": stats}


def normalise(x, mean, var, params):
    return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


@pytest.mark.parametrize("kind", ["frozen", "batch", "sync"])
def test_evaluation_uses_running_statistics(images, kind):
    variables = variables_for(kind, 6)
    stats = variables["batch_stats"]
    expected = normalise(images, stats["mean"], stats["var"], variables["params"])
    found = Norm(kind).apply(variables, images, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_norm_never_changes(images):
    variables = variables_for("frozen", 6)

    def loss(params):
        y, updates = Norm("frozen").apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(y**2), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], variables["batch_stats"]["mean"])


@pytest.mark.parametrize(("kind", "parts"), [("batch", 2), ("sync", 1)])
def test_training_statistics_come_from_one_device_or_from_all(images, kind, parts):
    variables = variables_for(kind, 6)
    norm = Norm(kind, axis_name="data", momentum=0.9)

    def on_device(share):
        return norm.apply(variables, share, train=True, mutable=["batch_stats"])

    found, updates = jax.vmap(on_device, axis_name="data")(images.reshape(2, 2, *images.shape[1:]))
    found = found.reshape(images.shape)
    first, second = (jax.tree.map(lambda x, i=i: x[i], updates) for i in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    updates = first

    pieces, means, unbiased = [], [], []
    for piece in np.split(images, parts):
        flat = piece.reshape(-1, 6)
        pieces.append(normalise(piece, flat.mean(0), flat.var(0), variables["params"]))
        means.append(flat.mean(0))
        unbiased.append(flat.var(0, ddof=1))
    np.testing.assert_allclose(found, np.concatenate(pieces), rtol=1e-4, atol=1e-4)
    old = variables["batch_stats"]
    np.testing.assert_allclose(
        updates["batch_stats"]["mean"], 0.9 * old["mean"] + 0.1 * np.mean(means, 0), rtol=1e-4
    )
    np.testing.assert_allclose(
        updates["batch_stats"]["var"], 0.9 * old["var"] + 0.1 * np.mean(unbiased, 0), rtol=1e-4
    )


def test_group_norm_normalises_each_image_over_groups_of_channels(images):
    variables = variables_for("group", 6)
    found = Norm("group", channel_groups=3).apply(variables, images, train=True)
    split = images.reshape(4, -1, 3, 2).transpose(0, 2, 1, 3).reshape(4, 3, -1)
    mean = np.repeat(split.mean(-1), 2, -1)[:, None, None]
    var = np.repeat(split.var(-1), 2, -1)[:, None, None]
    expected = normalise(images, mean, var, variables["params"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_takes_channel_counts_that_32_does_not_divide():
    x = np.ones((1, 2, 2, 40), np.float32)
    variables = Norm("group").init(jax.random.key(0), x, train=True)
    assert np.isfinite(Norm("group").apply(variables, x, train=True)).all()


def test_the_batch_norm_kinds_share_one_tree(images):
    def paths(kind):
        variables = Norm(kind).init(jax.random.key(0), images, train=False)
        return set(traverse_util.flatten_dict(variables, sep="/"))

    assert paths("frozen") == paths("batch") == paths("sync")
    assert paths("group") == {"params/scale", "params/bias"}


@pytest.mark.parametrize("kind", ["frozen", "sync", "group"])
def test_bfloat16_activations_keep_float32_statistics_and_parameters(images, kind):
    norm = Norm(kind, dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), images, train=False)
    # 256 + noise: bfloat16 sums of squares would lose the variance altogether.
    x = jnp.asarray(256 + 8 * np.round(images), jnp.bfloat16)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    if kind == "sync":
        np.testing.assert_allclose(np.std(np.float32(y), (0, 1, 2)), 1.0, atol=0.02)


def test_an_unknown_kind_is_named(images):
    with pytest.raises(UserError, match="'instance'.*frozen, batch, sync, group"):
        Norm("instance").init(jax.random.key(0), images, train=False)


def test_training_equals_torch(images):
    torch = pytest.importorskip("torch", reason="compares with torch's batch norm")
    variables = variables_for("sync", 6)
    layer = torch.nn.BatchNorm2d(6)
    layer.load_state_dict(
        {
            "weight": torch.tensor(variables["params"]["scale"]),
            "bias": torch.tensor(variables["params"]["bias"]),
            "running_mean": torch.tensor(variables["batch_stats"]["mean"]),
            "running_var": torch.tensor(variables["batch_stats"]["var"]),
            "num_batches_tracked": torch.tensor(0),
        }
    )
    expected = layer.train()(torch.tensor(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    found, updates = Norm("sync").apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], layer.running_var.numpy(), rtol=1e-5)
