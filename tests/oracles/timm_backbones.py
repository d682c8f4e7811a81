"""timm's networks with random weights: an independent peer for our backbones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from common.nn.backbones import make_backbone
from common.nn.weights.backbone_weights import convert_state_dict


def assert_equals_timm(
    name: str, timm_name: str, size: tuple[int, int], layout=None, **options
) -> None:
    """Builds a random network of timm and compares it as `assert_equals`.

    Args:
      name: our backbone.
      timm_name: timm's.
      size: height, width of the images.
      layout: of a smaller variant of our backbone.
      options: that make timm's network the same variant.
    """
    timm, torch = import_timm()
    torch.manual_seed(0)
    options |= {"features_only": True, "out_indices": (1, 2, 3, 4)}
    assert_equals(name, timm.create_model(timm_name, **options), size, layout)


def timm_hrnet_stages(widths: tuple[int, int, int, int]) -> dict[str, dict]:
    """timm's options of an HRNet with one module of one block in each stage."""
    stages = {}
    for stage in (1, 2, 3, 4):
        stages[f"stage{stage}"] = {
            "num_modules": 1,
            "num_branches": stage,
            "block_type": "BOTTLENECK" if stage == 1 else "BASIC",
            "num_blocks": (1,) * stage,
            "num_channels": (64,) if stage == 1 else widths[:stage],
            "fuse_method": "SUM",
        }
    return stages


def import_timm():
    """The modules timm and torch; skips the test where they are missing."""
    try:
        import timm
        import torch
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        pytest.skip(f"compares with timm, which cannot be imported: {error}")
    return timm, torch


def assert_equals(name: str, peer, size: tuple[int, int], layout=None) -> None:
    """Converts a random torch network that returns four taps; compares parameter count and taps.

    Batch norm statistics are randomised; taps may differ by 1e-4 of their largest value.
    """
    _, torch = import_timm()
    peer = peer.eval()
    fields = {} if layout is None else {"layout": layout}
    for layer in peer.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.normal_(layer.running_mean, 0.0, 0.1)
            # Below 1 so that hundreds of residual layers do not amplify rounding into chaos (with
            # 0.5..1.5, B7 in float32 differs from itself in float64 by 84 %).
            torch.nn.init.uniform_(layer.weight, 0.3, 0.9)
            torch.nn.init.normal_(layer.bias, 0.0, 0.1)
    # Some of timm's feature extractors wrap the network.
    state = {k.removeprefix("body."): v.numpy() for k, v in peer.state_dict().items()}

    flat, report = convert_state_dict(state, name, **fields)
    assert not report.missing
    assert all(key.endswith("num_batches_tracked") for key in report.unused)
    variables = traverse_util.unflatten_dict(flat, sep="/")
    count = sum(value.size for value in jax.tree.leaves(variables["params"]))
    assert count == sum(value.numel() for value in peer.parameters())

    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(images).permute(0, 3, 1, 2))
    module = make_backbone(name, norm="frozen", **fields)
    found = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, jnp.asarray(images))
    for tap, theirs in zip(("c2", "c3", "c4", "c5"), expected, strict=True):
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        assert found[tap].shape == theirs.shape
        scale = np.abs(theirs).max()
        assert np.isfinite(scale) and scale > 1e-6
        assert np.abs(found[tap] - theirs).max() <= 1e-4 * scale, tap
