"""Public weights for the segmenter: of the whole network, or of its trunk alone.

The HRNet segmentation repository and timm call the trunk's tensors alike. The former's head is
`last_layer.0` (mixing convolution), `.1` (norm) and `.3` (logits, of the classes of its data set).
Files of ours have the keys of the network (`params/backbone/...`, `params/head/...`) or those of a
backbone (`params/stem/...`), as written by `scripts.convert_weights`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from common.nn.weights.backbone_weights import (
    LoadReport,
    State,
    convert_state_dict,
    load_backbone_weights,
    read_safetensors,
)
from common.training import distributed
from common.training.step import TrainState

_HEAD = {
    "0.weight": "params/head/mix/kernel",
    "0.bias": "params/head/mix/bias",
    "1.weight": "params/head/norm/scale",
    "1.bias": "params/head/norm/bias",
    "1.running_mean": "batch_stats/head/norm/mean",
    "1.running_var": "batch_stats/head/norm/var",
    "3.weight": "params/head/logits/kernel",
    "3.bias": "params/head/logits/bias",
}
_LOGITS = "params/head/logits/"


def is_segmenter(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a torch state dict has the segmentation head."""
    return any(name.startswith(("last_layer.", "model.last_layer.")) for name in state)


def convert_segmenter(state: State, backbone: str, **fields) -> tuple[State, LoadReport]:
    """Renames and transposes a state dict of the HRNet segmentation repository, float32.

    The logits are kept where they are two, background and foreground; those of other data sets
    have no meaning here and are reported as unused.

    Args:
      state: by torch's names, with or without the prefix `model.` of the repository's training.
      backbone: name of the trunk.
      fields: of its module, where it is a variant (`common.nn.backbones.make_backbone`).

    Raises:
      UserError: a tensor of the trunk has another shape than ours.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    trunk = {k: v for k, v in state.items() if not k.startswith("last_layer.")}
    converted, report = convert_state_dict(trunk, backbone, **fields)
    result = {_inside(name, "backbone"): value for name, value in converted.items()}
    unused = list(report.unused)
    logits = state.get("last_layer.3.weight")
    two_logits = logits is not None and logits.shape[0] == 2
    for name in state.keys() - trunk.keys():
        path = _HEAD.get(name.removeprefix("last_layer."))
        if path is None or (path.startswith(_LOGITS) and not two_logits):
            unused.append(name)
            continue
        value = state[name]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        result[path] = np.ascontiguousarray(value, np.float32)
    missing = [_inside(name, "backbone") for name in report.missing]
    missing += [
        path for path in _HEAD.values() if path not in result and not path.startswith(_LOGITS)
    ]
    return result, LoadReport(sorted(result), sorted(unused), missing)


def with_pretrained(state: TrainState, path: str, mesh: Mesh, say: Callable) -> TrainState:
    """Replaces random parameters and statistics by those of a converted file.

    Raises:
      UserError: unreadable file, or one of another network.
    """
    names = read_safetensors(path)
    whole = any(name.startswith("params/backbone/") for name in names)
    flat = traverse_util.flatten_dict(
        {"params": state.params, "batch_stats": state.batch_stats}, sep="/"
    )
    if whole:
        # Logits of other classes than ours were left out of the file: they start at random.
        chosen = {k: v for k, v in flat.items() if not k.startswith(_LOGITS) or k in names}
    else:
        chosen = {_outside(k): v for k, v in flat.items() if k.split("/")[1] == "backbone"}
    tree = traverse_util.unflatten_dict(distributed.to_host(chosen), sep="/")
    loaded, report = load_backbone_weights(path, tree)
    say(f"pretrained: {path}: {report}", flush=True)
    loaded = traverse_util.flatten_dict(distributed.replicate(loaded, mesh), sep="/")
    flat |= loaded if whole else {_inside(k, "backbone"): v for k, v in loaded.items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return dataclasses.replace(
        state, params=variables["params"], batch_stats=variables.get("batch_stats", {})
    )


def _inside(path: str, module: str) -> str:
    collection, rest = path.split("/", 1)
    return f"{collection}/{module}/{rest}"


def _outside(path: str) -> str:
    collection, _, rest = path.split("/", 2)
    return f"{collection}/{rest}"
