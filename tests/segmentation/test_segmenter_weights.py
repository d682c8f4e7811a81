import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from common.io.errors import UserError
from common.nn.backbones.hrnet import Layout
from common.nn.weights.backbone_weights import save_backbone_weights
from common.training import distributed
from common.training.step import TrainState
from segmentation.models.segmenter import Segmenter
from segmentation.pretrained import convert_segmenter, is_segmenter, with_pretrained
from tests.oracles.timm_backbones import import_timm, timm_hrnet_stages
from tests.oracles.variables import random_values

TINY = Layout(4, (1, 1, 1), 1)
SIZE = (64, 96)


def timm_network():
    """A tiny random HRNet of timm."""
    timm, torch = import_timm()
    torch.manual_seed(0)
    network = timm.create_model(
        "hrnet_w18",
        features_only=True,
        out_indices=(1, 2, 3, 4),
        feature_location="",
        **timm_hrnet_stages((4, 8, 16, 32)),
    ).eval()
    return network, torch


def head_state(torch, width, outputs):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    return {
        "last_layer.0.weight": normal(width, width, 1, 1),
        "last_layer.0.bias": normal(width),
        "last_layer.1.weight": normal(width) + 1,
        "last_layer.1.bias": normal(width),
        "last_layer.1.running_mean": normal(width),
        "last_layer.1.running_var": normal(width).abs() + 0.5,
        "last_layer.1.num_batches_tracked": torch.tensor(3),
        "last_layer.3.weight": normal(outputs, width, 1, 1),
        "last_layer.3.bias": normal(outputs),
    }


def test_network_with_head_equals_torch():
    network, torch = timm_network()
    head = head_state(torch, 60, 2)
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)
    mean, std = (torch.tensor(v) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    functional = torch.nn.functional
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.normal_(layer.running_mean, 0.0, 0.1)
    with torch.no_grad():
        x = ((torch.tensor(images).float() - mean) / std).permute(0, 3, 1, 2)
        taps = network(x)
        size = taps[0].shape[-2:]
        x = torch.cat(
            [functional.interpolate(t, size, mode="bilinear", align_corners=False) for t in taps], 1
        )
        x = functional.conv2d(x, head["last_layer.0.weight"], head["last_layer.0.bias"])
        x = functional.batch_norm(
            x,
            head["last_layer.1.running_mean"],
            head["last_layer.1.running_var"],
            head["last_layer.1.weight"],
            head["last_layer.1.bias"],
            eps=1e-5,
        )
        x = functional.conv2d(x.relu(), head["last_layer.3.weight"], head["last_layer.3.bias"])
        x = functional.interpolate(x, SIZE, mode="bilinear", align_corners=False)
        expected = x.softmax(1)[:, 1].numpy()

    state = {f"model.{k}": v.numpy() for k, v in {**network.state_dict(), **head}.items()}
    assert is_segmenter(state)
    flat, report = convert_segmenter(state, "hrnet_w18", layout=TINY)
    assert not report.missing
    assert all(name.endswith("num_batches_tracked") for name in report.unused)
    model = Segmenter(1, "hrnet_w18", layout=TINY, upsampling="nearest", norm="frozen")
    batch = {
        "image": images,
        "image_size": np.full((2, 2), SIZE, np.float32),
        "image_valid": np.ones(2, bool),
        "classes": np.zeros(2, np.int32),
    }
    variables = traverse_util.unflatten_dict(flat, sep="/")
    logits = jax.jit(lambda v: model.apply(v, batch, train=False)["logits"])(variables)
    assert expected.std() > 0.01
    np.testing.assert_allclose(jax.nn.sigmoid(logits), expected, atol=1e-4)


# ----------------------------------------------------------------------------- without torch


@pytest.fixture(scope="module")
def state():
    model = Segmenter(1, "hrnet_w18", layout=TINY)
    batch = {
        "image": np.zeros((1, 32, 32, 3), np.uint8),
        "image_size": np.full((1, 2), 32.0),
        "image_valid": np.ones(1, bool),
        "classes": np.zeros(1, np.int32),
        "mask": np.zeros((1, 32, 32), np.uint8),
    }
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=True))
    variables = distributed.replicate(random_values(shapes), distributed.make_mesh())
    return TrainState(
        jnp.zeros((), jnp.int32),
        jax.random.key_data(jax.random.key(0)),
        variables["params"],
        variables["batch_stats"],
        (),
    )


def flat_variables(state):
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    return traverse_util.flatten_dict(distributed.to_host(tree), sep="/")


def other_values(state):
    rng = np.random.default_rng(0)
    return {
        k: np.ascontiguousarray(rng.normal(size=v.shape), np.float32)
        for k, v in flat_variables(state).items()
    }


@pytest.mark.parametrize("kind", ["whole", "no_logits", "trunk"])
def test_files_of_the_network_and_of_a_backbone_start_a_run(state, kind, tmp_path):
    values = other_values(state)
    if kind == "whole":
        written = used = values
    elif kind == "no_logits":
        written = used = {k: v for k, v in values.items() if "/head/logits/" not in k}
    else:
        used = {k: v for k, v in values.items() if "/backbone/" in k}
        written = {k.replace("/backbone/", "/"): v for k, v in used.items()}
    path = tmp_path / "weights.safetensors"
    save_backbone_weights(path, written, "hrnet_w18", "test")
    lines = []
    loaded = with_pretrained(state, path, distributed.make_mesh(), lambda *a, **_: lines.append(a))
    before, after = flat_variables(state), flat_variables(loaded)
    assert after.keys() == before.keys()
    for name, value in after.items():
        np.testing.assert_array_equal(value, used.get(name, before[name]))
    assert f"used     {len(used)}" in lines[0][0]


def test_file_of_another_width_and_missing_file_are_refused(state, tmp_path):
    values = {k.replace("/backbone/", "/"): v for k, v in other_values(state).items()}
    path = tmp_path / "weights.safetensors"
    name = "params/transition1/branch0_conv/kernel"
    save_file(
        {k: v for k, v in values.items() if "/head/" not in k}
        | {name: np.zeros((3, 3, 256, 18), np.float32)},
        path,
    )
    mesh = distributed.make_mesh()
    with pytest.raises(UserError, match=f"{name}: found shape .*18.*, expected .*4"):
        with_pretrained(state, path, mesh, print)
    with pytest.raises(UserError, match="no such file"):
        with_pretrained(state, tmp_path / "nothing.safetensors", mesh, print)


def test_logits_of_other_data_sets_are_left_out():
    state = {
        "last_layer.3.weight": np.ones((19, 60, 1, 1), np.float32),
        "last_layer.3.bias": np.ones(19, np.float32),
        "last_layer.0.bias": np.ones(60, np.float32),
    }
    flat, report = convert_segmenter(state, "hrnet_w18", layout=TINY)
    assert list(flat) == ["params/head/mix/bias"]
    assert report.unused == ["last_layer.3.bias", "last_layer.3.weight"]
    assert "params/head/mix/kernel" in report.missing
