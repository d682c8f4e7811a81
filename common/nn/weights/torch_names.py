"""Names of torch modules in our networks: torchvision, timm, the HRNet and SENet releases.

Each function takes the name of a torch module such as `layer2.0.bn1` and the backbone, and returns
the path of ours, or None where our trunk has no such module (a classifier).
"""

import re
from collections.abc import Callable

from common.nn.backbones.efficientnet import EFFICIENTNETS, stage_repeats
from common.nn.backbones.hrnet import HRNETS
from common.nn.backbones.nasnet import NASNETS
from common.nn.backbones.senet import SENETS


def module_path(name: str, backbone: str) -> str | None:
    """Path in our tree of the torch module `name` of `backbone`, or None."""
    return _names_of(backbone)(name, backbone)


def _names_of(backbone: str) -> Callable[[str, str], str | None]:
    tables = ((EFFICIENTNETS, _efficientnet), (HRNETS, _hrnet), (NASNETS, _nasnet))
    return next((names for table, names in tables if backbone in table), _resnet)


_STEMS = {
    "conv1": "stem/conv",
    "bn1": "stem/norm",
    "layer0.conv1": "stem/conv",
    "layer0.bn1": "stem/norm",
}
_BLOCK = {
    "downsample.0": "downsample_conv",
    "downsample.1": "downsample_norm",
    "se_module.fc1": "se_reduce",
    "se_module.fc2": "se_expand",
}


def _resnet(name: str, backbone: str) -> str | None:
    """`layer2.0.bn1` -> `stage2/block0/norm1`; SENets call the stem `layer0`."""
    if backbone == "senet154" and (match := re.fullmatch(r"layer0\.(conv|bn)(\d)", name)):
        return f"stem/{_norm(match[1])}{match[2]}"
    if (backbone in SENETS) == name.startswith("layer0.") and name in _STEMS:
        return _STEMS[name]
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", name):
        module = _block_module(match[3])
        return module and f"stage{match[1]}/block{match[2]}/{module}"
    return None


def _block_module(name: str) -> str | None:
    if match := re.fullmatch(r"(conv|bn)(\d)", name):
        return f"{_norm(match[1])}{match[2]}"
    return _BLOCK.get(name)


def _norm(kind: str) -> str:
    return {"bn": "norm", "0": "conv", "1": "norm"}.get(kind, kind)


def _hrnet(name: str, backbone: str) -> str | None:
    """`stage3.0.fuse_layers.2.0.1.0` -> `stage3/module0/fuse/from0_to2_down1_conv`."""
    del backbone
    if match := re.fullmatch(r"(conv|bn)([12])", name):
        return f"stem/{_norm(match[1])}{match[2]}"
    if match := re.fullmatch(r"layer1\.(\d+)\.(.+)", name):
        module = _block_module(match[2])
        return module and f"stage1/block{match[1]}/{module}"
    # A branch of a new resolution sits in one more torch.nn.Sequential.
    if match := re.fullmatch(r"transition([123])\.(\d)(?:\.0)?\.([01])", name):
        return f"transition{match[1]}/branch{match[2]}_{_norm(match[3])}"
    match = re.fullmatch(r"stage([234])\.(\d+)\.(branches|fuse_layers)\.(.+)", name)
    if not match:
        return None
    stage, rest = f"stage{match[1]}/module{match[2]}", match[4]
    if match[3] == "branches":
        branch, block, module = rest.split(".", 2)
        module = _block_module(module)
        return module and f"{stage}/branch{branch}/block{block}/{module}"
    if match := re.fullmatch(r"(\d)\.(\d)\.([01])", rest):
        return f"{stage}/fuse/from{match[2]}_to{match[1]}_{_norm(match[3])}"
    if match := re.fullmatch(r"(\d)\.(\d)\.(\d)\.([01])", rest):
        return f"{stage}/fuse/from{match[2]}_to{match[1]}_down{match[3]}_{_norm(match[4])}"
    return None


_NASNET_CELL = {
    "conv_1x1.conv": "squeeze_conv",
    "conv_1x1.bn": "squeeze_norm",
    "conv_prev_1x1.conv": "squeeze_previous_conv",
    "conv_prev_1x1.bn": "squeeze_previous_norm",
    "path_1.conv": "factor1_conv",
    "path_2.conv": "factor2_conv",
    "final_path_bn": "factor_norm",
}


def _nasnet(name: str, backbone: str) -> str | None:
    """`cell_3.comb_iter_0_left.separable_1.pointwise_conv2d` ->
    `cell3/combine0_left/pointwise1_conv`."""
    del backbone
    if name in ("conv0.conv", "conv0.bn"):
        return {"conv0.conv": "stem/conv", "conv0.bn": "stem/norm"}[name]
    match = re.fullmatch(r"(cell_stem|cell|reduction_cell)_(\d+)\.(.+)", name)
    if not match:
        return None
    kind = {"cell_stem": "stem_cell", "cell": "cell", "reduction_cell": "reduction"}[match[1]]
    cell, module = f"{kind}{match[2]}", match[3]
    if module in _NASNET_CELL:
        return f"{cell}/{_NASNET_CELL[module]}"
    pattern = (
        r"comb_iter_(\d_(?:left|right))\."
        r"(?:separable_(\d)\.(depthwise|pointwise)_conv2d|bn_sep_(\d))"
    )
    if not (match := re.fullmatch(pattern, module)):
        return None
    operation, number, convolution, norm_number = match.groups()
    last = f"norm{norm_number}" if norm_number else f"{convolution}{number}_conv"
    return f"{cell}/combine{operation}/{last}"


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


def _efficientnet(name: str, backbone: str) -> str | None:
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
