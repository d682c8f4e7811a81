"""ResNet trunks: taps, freezing, recomputation, and equality with timm."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from common.io.errors import UserError
from common.nn.backbones import BACKBONES, make_backbone, preprocessing
from tests.oracles.timm_backbones import assert_equals_timm
from tests.oracles.variables import random_variables

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


@functools.cache
def initial(name):
    return random_variables(make_backbone(name, norm="sync"))


@functools.cache
def gradients(**fields):
    """Gradients by '/'-joined path, loss, and updated statistics of a training pass."""
    module, variables = make_backbone("resnet18", **fields), initial("resnet18")

    def loss(params):
        taps, updates = module.apply(
            {**variables, "params": params}, IMAGES, True, mutable=["batch_stats"]
        )
        return sum(jnp.mean(tap.astype(jnp.float32) ** 2) for tap in taps.values()), updates

    (value, updates), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return traverse_util.flatten_dict(grads, sep="/"), value, updates


@pytest.mark.parametrize("name", [n for n in BACKBONES if n.startswith("resnet")])
@pytest.mark.parametrize("size", [(64, 96), (101, 67)])
def test_taps_have_strides_4_to_32(name, size):
    module = make_backbone(name)
    taps = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, False)[0],
        jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )
    expansion = 1 if name in ("resnet10", "resnet18", "resnet34") else 4
    for i, tap in enumerate(("c2", "c3", "c4", "c5")):
        stride = 4 * 2**i
        height, width = (-(-side // stride) for side in size)
        assert taps[tap].shape == (1, height, width, 64 * 2**i * expansion)


def test_parameter_paths_read_like_the_network():
    params = traverse_util.flatten_dict(initial("resnet18")["params"], sep="/")
    for path in (
        "stem/conv/kernel",
        "stage1/block0/conv1/kernel",
        "stage2/block0/norm2/scale",
        "stage2/block0/downsample_conv/kernel",
        "stage4/block1/conv2/kernel",
    ):
        assert path in params
    assert params["stage1/block0/conv1/kernel"].shape == (3, 3, 64, 64)


@pytest.mark.parametrize(("norm", "frozen_stages"), [("frozen", 0), ("sync", 0), ("sync", 2)])
def test_what_the_pattern_names_and_nothing_else_is_frozen(norm, frozen_stages):
    module = make_backbone("resnet18", norm=norm, frozen_stages=frozen_stages)
    variables = initial("resnet18")
    grads, _, updates = gradients(norm=norm, frozen_stages=frozen_stages)
    for path, grad in grads.items():
        frozen = re.fullmatch(module.frozen_pattern(), path) is not None
        assert frozen == bool(np.all(grad == 0)), path
    old = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    for path, value in traverse_util.flatten_dict(updates["batch_stats"], sep="/").items():
        stage = path.split("/")[0]
        frozen = norm == "frozen" or (frozen_stages and stage in ("stem", "stage1", "stage2"))
        assert frozen == np.array_equal(value, old[path]), path


def test_recomputation_changes_memory_not_results():
    plain = gradients(norm="sync", frozen_stages=0)
    remat = gradients(norm="sync", frozen_stages=0, remat=True)
    assert plain[0].keys() == remat[0].keys()
    np.testing.assert_allclose(plain[1], remat[1], rtol=1e-6)
    for path, grad in plain[0].items():
        np.testing.assert_allclose(
            grad, remat[0][path], rtol=1e-3, atol=1e-4 * np.abs(grad).max(), err_msg=path
        )


def test_bfloat16_stays_near_float32_with_float32_parameters():
    module = make_backbone("resnet18", norm="sync", dtype=jnp.bfloat16)
    variables = initial("resnet18")
    low = jax.jit(lambda v: module.apply(v, IMAGES, False))(variables)
    full = jax.jit(lambda v: make_backbone("resnet18").apply(v, IMAGES, False))(variables)
    for tap, value in full.items():
        assert low[tap].dtype == jnp.bfloat16
        difference = np.abs(np.float32(low[tap]) - value).max()
        assert difference < 0.05 * np.abs(value).max()


def test_group_norm_has_no_running_statistics():
    module = make_backbone("resnet18", norm="group")
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), IMAGES, False))
    assert set(variables) == {"params"}
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(
        initial("resnet18")["params"]
    )


def test_unknown_backbone_is_named():
    with pytest.raises(UserError, match="'resnet20'.*resnet18"):
        make_backbone("resnet20")
    with pytest.raises(UserError, match="resnet20"):
        preprocessing("resnet20")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (96, 128)),
        pytest.param("resnet34", (97, 131), marks=pytest.mark.slow),
        ("resnet50", (97, 131)),
        pytest.param("resnet101", (96, 128), marks=pytest.mark.slow),
        pytest.param("resnet152", (96, 128), marks=pytest.mark.slow),
    ],
)
def test_equals_timm(name, size):
    assert_equals_timm(name, name, size)
