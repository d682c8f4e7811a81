"""The feature pyramid with norms behind its convolutions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detection.models.fpn import FPN
from detection.models.two_stage import frozen_pattern
from detection.settings import read_run
from tests import tiny


def taps(scale):
    rng = np.random.default_rng(0)
    return {
        f"c{level}": jnp.asarray(
            scale * rng.standard_normal((2, 64 >> level, 96 >> level, 8)), jnp.float32
        )
        for level in (2, 3, 4, 5)
    }


@pytest.mark.parametrize("norm", ["batch", "sync", "group"])
def test_with_norm_the_scale_of_the_taps_does_not_matter(norm):
    model = FPN(32, norm)
    variables = model.init(jax.random.key(0), taps(1.0), True)
    small, _ = model.apply(variables, taps(1.0), True, mutable=["batch_stats"])
    large, _ = model.apply(variables, taps(100.0), True, mutable=["batch_stats"])
    for name, level in small.items():
        # Coarse levels have few values to normalise over, beside which the epsilon shows.
        np.testing.assert_allclose(large[name], level, atol=2e-2, err_msg=name)
    assert small["p2"].std() == pytest.approx(1.0, abs=0.1)


def test_without_norm_it_does():
    model = FPN(32)
    variables = model.init(jax.random.key(0), taps(1.0), True)
    small, large = (model.apply(variables, taps(scale), True) for scale in (1.0, 100.0))
    np.testing.assert_allclose(large["p2"], 100 * small["p2"], rtol=1e-4, atol=1e-3)


def test_frozen_norms_of_pyramid_and_heads_are_not_trained():
    config = tiny.get_config()
    config.model.fpn_norm = "frozen"
    config.model.box_head.convs.update(count=1, norm="frozen")
    pattern = frozen_pattern(read_run(config).model)
    for path in ("neck/lateral2_norm/scale", "box_head/norm1/bias", "box_head2/norm1/bias"):
        assert re.fullmatch(pattern, path), path
    for path in ("neck/lateral2/kernel", "box_head/conv1/kernel", "mask_head/norm1/scale"):
        assert not re.fullmatch(pattern, path), path
