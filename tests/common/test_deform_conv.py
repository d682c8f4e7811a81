"""Deformable convolution equals its twin and torchvision's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.bilinear import METHODS
from common.nn.conv import Conv, conv2d
from common.nn.deform_conv import DeformConv, deform_conv2d
from tests.oracles import deform_conv as oracle

CASES = {
    "v1": dict(),
    "v2": dict(modulated=True),
    "stride 2": dict(stride=2),
    "dilation 2": dict(dilation=2, padding=2),
    "grouped v2": dict(groups=2, modulated=True),
}


def make_case(stride=1, padding=1, dilation=1, groups=1, modulated=False):
    rng = np.random.default_rng(0)
    height, width, channels, features = 7, 9, 4, 6
    x = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    out = [(n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in (height, width)]
    offsets = rng.normal(0, 1.5, (2, *out, 18)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels // groups, features)).astype(np.float32)
    mask = rng.random((2, *out, 9)).astype(np.float32) if modulated else None
    return (x, offsets, kernel, mask), dict(
        stride=stride, padding=padding, dilation=dilation, groups=groups
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_twin(name, method):
    (x, offsets, kernel, mask), options = make_case(**CASES[name])
    ours = deform_conv2d(x, offsets, kernel, mask=mask, method=method, **options)
    expected = oracle.deform_conv2d(x, offsets, kernel, mask, **options)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["stride 2", "grouped v2"])
def test_gradients_equal_torchvision(name, method):
    torch = pytest.importorskip("torch", reason="the peer, torchvision, is not installed")
    ops = pytest.importorskip("torchvision.ops", reason="the peer, torchvision, is not installed")
    (x, offsets, kernel, mask), options = make_case(**CASES[name])
    weights = np.random.default_rng(1).normal(size=(*offsets.shape[:3], kernel.shape[-1]))
    arrays = (x, offsets, kernel) + (() if mask is None else (mask,))

    def ours(x, offsets, kernel, mask=None):
        out = deform_conv2d(x, offsets, kernel, mask=mask, method=method, **options)
        return (out * weights).sum()

    gradients = jax.grad(ours, argnums=range(len(arrays)))(*map(jnp.asarray, arrays))
    # Channels first; the kernel is (D, C per group, k, k).
    orders = ((0, 3, 1, 2), (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    theirs = [
        torch.from_numpy(np.ascontiguousarray(a.transpose(order))).requires_grad_()
        for a, order in zip(arrays, orders, strict=False)
    ]
    out = ops.deform_conv2d(
        *theirs[:3], stride=options["stride"], padding=options["padding"],
        dilation=options["dilation"], mask=theirs[3] if len(theirs) > 3 else None,
    )
    (out * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
    for gradient, tensor, order in zip(gradients, theirs, orders, strict=False):
        np.testing.assert_allclose(
            np.asarray(gradient).transpose(order), tensor.grad.numpy(), rtol=2e-3, atol=2e-4
        )


def test_without_offsets_it_is_an_ordinary_convolution():
    (x, offsets, kernel, _), options = make_case()
    np.testing.assert_allclose(
        deform_conv2d(x, 0 * offsets, kernel, **options),
        conv2d(jnp.asarray(x), jnp.asarray(kernel), padding=1), rtol=1e-4, atol=1e-4,
    )


@pytest.mark.parametrize(("version", "factor"), [(1, 1.0), (2, 0.5)])
def test_layer_starts_as_the_convolution_it_replaces(version, factor):
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 4))
    layer = DeformConv(8, 3, padding=1, version=version)
    params = layer.init(jax.random.key(1), x)["params"]
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(params["offset"]))
    plain = Conv(8, 3, padding=1).apply({"params": {"kernel": params["kernel"]}}, x)
    # v2 multiplies samples by sigmoid(0) at the start.
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), factor * plain, rtol=1e-4, atol=1e-5
    )


def test_offsets_of_another_shape_are_refused():
    (x, offsets, kernel, _), options = make_case()
    with pytest.raises(ValueError, match="offsets of shape .*, expected"):
        deform_conv2d(x, offsets[..., :-2], kernel, **options)
