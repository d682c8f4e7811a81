"""torchvision's `fasterrcnn_resnet50_fpn`, `maskrcnn_resnet50_fpn` and their `_v2`, and any such
detector on another ResNet.

The `_v2` have batch norms in pyramid and heads, two convolutions in the proposal network and
convolutions in the box head. The released weights of the others were trained with an epsilon of 0.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from common.nn.weights.backbone_weights import State
from detection.foreign.arrays import Outputs
from detection.foreign.coco import LAST_ID
from detection.foreign.family import (
    Foreign,
    Options,
    backbone_name,
    count,
    norm_kind,
    resnet_name,
    shape,
    split_classes,
    taken_apart,
)

_BLOCK = r"backbone\.body\.layer(\d)\.(\d+)\."
# Names of before torchvision 0.13, which its loader renames as well.
_OLD_NAMES = (
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2"),
)
_OLD_MASK = r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)"
# What torchvision computes otherwise than configs/detection/base.py.
CHANGES: Mapping[str, Any] = {
    "model.norm": "frozen",
    "model.anchors.centre": 0.0,
    "model.anchors.rounded": True,
    "model.anchors.spacing": "canvas",
    "model.rpn.loss.beta": 1 / 9,
    "model.box_head.aligned": False,
    "model.box_head.loss.beta": 1 / 9,
    "model.detections.score_threshold": 0.05,
    "model.detections.max_detections": 100,
}


def modern(state: State) -> State:
    """The state dict with today's names."""
    result = {}
    for name, value in state.items():
        for pattern, replacement in _OLD_NAMES:
            name = re.sub(f"^{pattern}$", replacement, name)
        if match := re.fullmatch(_OLD_MASK, name):
            name = f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
        result[name] = value
    return result


def their_name(name: str, num_convs: int) -> str:
    """Name of one of our modules; `num_convs` of the box head come before its dense layers."""
    if name.startswith("backbone/"):
        return "backbone.body." + backbone_name(name)
    module = taken_apart(name)
    layer, place = module.layer, module.number - 1
    if module.part == "neck":
        blocks = {"lateral": "inner_blocks", "output": "layer_blocks"}[layer]
        return f"backbone.fpn.{blocks}.{place - 1}.{int(module.norm)}"
    if module.part == "rpn_head":
        names = {"objectness": "cls_logits", "deltas": "bbox_pred"}
        return f"rpn.head.{names.get(layer, f'conv.{place}.0')}"
    # With convolutions, the box head is one sequence: these, flattening, dense layers with ReLUs.
    dense = num_convs + 1 + 2 * place if num_convs else f"fc{6 + place}"
    names = {
        "classifier": "box_predictor.cls_score",
        "regressor": "box_predictor.bbox_pred",
        "deconv": "mask_predictor.conv5_mask",
        "predictor": "mask_predictor.mask_fcn_logits",
        "conv": f"{module.part}.{place}.0",
        "norm": f"{module.part}.{place}.1",
        "fc": f"{module.part}.{dense}",
    }
    return f"roi_heads.{names[layer]}"


def describe(state: State, options: Options) -> Foreign:
    """What the (modern) state dict is of.

    Raises:
      UserError: a tensor is missing that tells, or a backbone that we lack.
    """
    outputs, width = shape(state, "roi_heads.box_predictor.cls_score.weight")
    num_classes, places = split_classes(outputs - 1, options)
    with_background = tuple(place + 1 for place in places)
    classes = Outputs(with_background, outputs)
    num_convs = count(state, r"roi_heads\.box_head\.(\d+)\.0\.weight")
    num_masks = count(state, r"roi_heads\.mask_head\.(\d+)\.0\.weight")
    style = options.style or "pytorch"
    changes = {
        **CHANGES,
        "model.backbone": resnet_name(state, _BLOCK, "backbone.body.layer1.0.conv2", style),
        "model.fpn_channels": shape(state, "backbone.fpn.inner_blocks.0.0.weight")[0],
        "model.fpn_norm": norm_kind(state, "backbone.fpn.inner_blocks.0.1"),
        "model.rpn.num_convs": count(state, r"rpn\.head\.conv\.(\d+)\."),
        "model.box_head.width": width,
    }
    if num_convs:
        changes |= {
            "model.box_head.convs": dict(
                count=num_convs,
                width=shape(state, "roi_heads.box_head.0.0.weight")[0],
                norm=norm_kind(state, "roi_heads.box_head.0.1"),
            ),
            "model.box_head.num_fcs": count(state, r"roi_heads\.box_head\.(\d+)\.weight"),
        }
    if num_masks:
        changes |= {
            "model.mask_head.kind": "class_specific",
            "model.mask_head.num_convs": num_masks,
            "model.mask_head.width": shape(state, "roi_heads.mask_head.0.0.weight")[0],
            "model.mask_head.norm": norm_kind(state, "roi_heads.mask_head.0.1"),
        }
    epsilon: float | None = options.norm_epsilon
    notes: tuple[str, ...] = ()
    if left_out := outputs - 1 - num_classes:
        notes += (f"outputs of {left_out} ids that no class of COCO has are left out",)
    if epsilon is None:
        # Batch norms that were never frozen count their batches.
        released = outputs == LAST_ID + 1 and "backbone.body.bn1.num_batches_tracked" not in state
        epsilon = 0.0 if released else 1e-5
        if released:
            notes += (
                "norm epsilon 0, that of the released weights (--norm_epsilon=1e-5 for another "
                "detector of 91 outputs)",
            )
    return Foreign(
        family="torchvision",
        num_classes=num_classes,
        changes=changes,
        their_name=functools.partial(their_name, num_convs=num_convs),
        class_outputs=Outputs((0, *with_background), outputs),
        box_outputs=classes,
        mask_outputs=classes if num_masks else None,
        norm_epsilon=epsilon,
        notes=notes,
    )
