"""EfficientNet trunks: taps, freezing, stochastic depth, and equality with timm."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from common.nn.backbones import BACKBONES, make_backbone
from common.nn.backbones.efficientnet import DropPath, scale_width
from tests.oracles.timm_backbones import assert_equals_timm
from tests.oracles.variables import random_variables

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


@functools.cache
def initial(name):
    return random_variables(make_backbone(name))


@pytest.mark.parametrize("name", [n for n in BACKBONES if n.startswith("efficientnet")])
def test_taps_have_strides_4_to_32(name):
    module = make_backbone(name)
    taps = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, False)[0],
        jax.ShapeDtypeStruct((1, 101, 67, 3), jnp.float32),
    )
    shapes = [taps[tap].shape[1:3] for tap in ("c2", "c3", "c4", "c5")]
    assert shapes == [(26, 17), (13, 9), (7, 5), (4, 3)]
    if name in ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_b0"):
        assert [taps[tap].shape[-1] for tap in sorted(taps)] == [24, 40, 112, 320]


def test_widths_are_multiples_of_8_near_the_scaled_value():
    assert scale_width(32, 1.0) == 32
    assert scale_width(24, 1.2) == 32  # 28.8 -> 32
    for channels in range(16, 400, 8):
        for multiplier in (1.0, 1.1, 1.4, 2.0):
            width = scale_width(channels, multiplier)
            assert width % 8 == 0 and width >= 0.9 * channels * multiplier


def test_what_the_pattern_names_and_nothing_else_is_frozen():
    module = make_backbone("efficientnet_lite0", norm="sync", frozen_stages=3, drop_path_rate=0.0)
    variables = initial("efficientnet_lite0")

    def loss(params):
        taps, _ = module.apply(
            {**variables, "params": params}, IMAGES, True, mutable=["batch_stats"]
        )
        # Not the plain mean square: it would cancel where a norm ends the stage.
        return sum(jnp.mean(jnp.sin(3 * tap)) for tap in taps.values())

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        frozen = re.fullmatch(module.frozen_pattern(), path) is not None
        assert frozen == bool(np.all(grad == 0)), path


def test_remat_and_all_norm_kinds_train():
    for norm in ("batch", "group"):
        module = make_backbone("efficientnet_b0", norm=norm, remat=True)
        shapes = jax.eval_shape(
            lambda x, module=module: module.init_with_output(
                {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, True
            )[0],
            jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
        )
        assert shapes["c5"].shape == (2, 2, 2, 320)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    x = jnp.ones((2000, 2, 2, 3))
    y = DropPath(0.25).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    per_image = np.asarray(y).reshape(2000, -1)
    assert np.all(per_image == per_image[:, :1])
    assert set(np.unique(per_image)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(per_image.mean() - 1) < 0.05
    np.testing.assert_array_equal(DropPath(0.25).apply({}, x, False), x)


def test_stochastic_depth_of_an_image_depends_on_its_place_alone():
    def drop(images):
        return DropPath(0.5).apply({}, images, True, rngs={"dropout": jax.random.key(3)})

    x = jnp.ones((64, 1, 1, 1))
    np.testing.assert_array_equal(drop(x)[:16], drop(x[:16]))


def test_training_draws_depth_and_evaluation_does_not():
    module = make_backbone("efficientnet_lite0", norm="frozen", drop_path_rate=0.9)
    variables = initial("efficientnet_lite0")
    run = jax.jit(
        lambda key, train: module.apply(variables, IMAGES, train, rngs={"dropout": key})["c5"],
        static_argnums=1,
    )
    first, again, other = (run(jax.random.key(i), True) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_lite0", (97, 131)),
        *(
            pytest.param(f"efficientnet_lite{i}", (97, 131), marks=pytest.mark.slow)
            for i in (1, 2, 3, 4)
        ),
        ("efficientnet_b0", (96, 128)),
        ("efficientnet_b0", (97, 131)),
        pytest.param("efficientnet_b1", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b2", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b3", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b4", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b5", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b6", (97, 131), marks=pytest.mark.slow),
        pytest.param("efficientnet_b7", (97, 131), marks=pytest.mark.slow),
    ],
)
def test_equals_timm(name, size):
    assert_equals_timm(name, f"tf_{name}", size)
