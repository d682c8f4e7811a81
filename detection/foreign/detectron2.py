"""detectron2's Faster, Mask and Cascade R-CNN with FPN on ResNets and ResNeXts.

Background is the last class. RoIAlign takes as many samples as a region has cells, anchors lie on
the corners of cells. ResNet-50 and -101 are the Caffe models of their authors; pixels come as blue,
green, red. Group norms of mask heads, deformable convolutions and the C4 and DC5 models are not
read.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from common.io.errors import UserError
from common.nn.weights.backbone_weights import State
from detection.foreign.arrays import Outputs
from detection.foreign.family import (
    Foreign,
    Options,
    cascade,
    count,
    norm_kind,
    resnet_name,
    shape,
    taken_apart,
)

_BLOCK = r"backbone\.bottom_up\.res(\d)\.(\d+)\."
_STDS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # inverse
CHANGES: Mapping[str, Any] = {
    "model.anchors.centre": 0.0,
    "model.rpn.loss.beta": 0.0,
    "model.rpn.train_proposals": dict(pre_nms=2000, post_nms=1000, nms_iou=0.7),
    "model.box_head.sampling_ratio": 0,
    "model.box_head.loss.beta": 0.0,
    "model.detections.score_threshold": 0.05,
    "model.detections.max_detections": 100,
}


def their_name(name: str, stages: int, rpn_convs: int) -> str:
    """Name of one of our modules in a model with so many box heads."""
    if match := re.fullmatch(r"backbone/stem/(conv|norm)", name):
        return "backbone.bottom_up.stem.conv1" + {"conv": "", "norm": ".norm"}[match[1]]
    if match := re.fullmatch(r"backbone/stage(\d)/block(\d+)/([a-z_]+)(\d?)", name):
        kind = match[3].replace("downsample_", "")
        layer = f"conv{match[4]}" if match[4] else "shortcut"
        suffix = ".norm" if kind == "norm" else ""
        return f"backbone.bottom_up.res{int(match[1]) + 1}.{match[2]}.{layer}{suffix}"
    module = taken_apart(name)
    number = module.number
    if module.part == "neck":
        return f"backbone.fpn_{module.layer}{number}{'.norm' if module.norm else ''}"
    if module.part == "rpn_head":
        conv = "conv" if rpn_convs == 1 else f"conv.conv{number - 1}"
        names = {"conv": conv, "objectness": "objectness_logits", "deltas": "anchor_deltas"}
        return f"proposal_generator.rpn_head.{names[module.layer]}"
    if module.part == "mask_head":
        conv = f"mask_fcn{number}"
        return "roi_heads.mask_head." + {"conv": conv, "norm": f"{conv}.norm"}.get(
            module.layer, module.layer
        )
    names = {
        "classifier": "predictor#.cls_score",
        "regressor": "predictor#.bbox_pred",
        "conv": f"head#.conv{number}",
        "norm": f"head#.conv{number}.norm",
        "fc": f"head#.fc{number}",
    }
    stage = f".{module.stage}" if stages > 1 else ""
    return "roi_heads.box_" + names[module.layer].replace("#", stage)


def describe(state: State, options: Options) -> Foreign:
    """What the state dict is of.

    Raises:
      UserError: a tensor is missing that tells, or a part that we lack.
    """
    stages = count(state, r"roi_heads\.box_predictor\.(\d+)\.") or 1
    if stages not in (1, 3):
        raise UserError(f"found a cascade of {stages} box heads, expected 1 or 3")
    first = ".0" if stages > 1 else ""
    head, predictor = f"roi_heads.box_head{first}", f"roi_heads.box_predictor{first}"
    outputs, width = shape(state, f"{predictor}.cls_score.weight")
    num_classes = outputs - 1
    is_agnostic = shape(state, f"{predictor}.bbox_pred.weight")[0] == 4
    every = tuple(range(num_classes))
    rpn_convs = count(state, r"proposal_generator\.rpn_head\.conv\.conv(\d)\.weight") or 1

    backbone = resnet_name(state, _BLOCK, "backbone.bottom_up.res2.0.conv2", options.style)
    changes = {
        **CHANGES,
        "model.backbone": backbone,
        "model.norm": norm_kind(state, "backbone.bottom_up.res2.0.conv1.norm"),
        "model.fpn_channels": shape(state, "backbone.fpn_lateral2.weight")[0],
        "model.fpn_norm": norm_kind(state, "backbone.fpn_lateral2.norm"),
        "model.rpn.num_convs": rpn_convs,
        "model.box_head.width": width,
        "model.box_head.class_agnostic": is_agnostic,
        "model.box_head.num_fcs": count(state, rf"{re.escape(head)}\.fc(\d)\.weight"),
    }
    if stages > 1:
        stds = [[1 / weight for weight in weights] for weights in _STDS]
        changes["model.stages"] = cascade(stds, (1.0, 1.0, 1.0), "probability")
    if num_convs := count(state, rf"{re.escape(head)}\.conv(\d)\.weight"):
        changes["model.box_head.convs"] = dict(
            count=num_convs,
            width=shape(state, f"{head}.conv1.weight")[0],
            norm=norm_kind(state, f"{head}.conv1.norm"),
        )
    masks = 0
    if num_masks := count(state, r"roi_heads\.mask_head\.mask_fcn(\d)\.weight"):
        masks = shape(state, "roi_heads.mask_head.predictor.weight")[0]
        changes |= {
            "model.mask_head.kind": "class_agnostic" if masks == 1 else "class_specific",
            "model.mask_head.num_convs": num_masks,
            "model.mask_head.width": shape(state, "roi_heads.mask_head.mask_fcn1.weight")[0],
            "model.mask_head.norm": norm_kind(state, "roi_heads.mask_head.mask_fcn1.norm"),
        }
    return Foreign(
        family="detectron2",
        num_classes=num_classes,
        changes=changes,
        their_name=functools.partial(their_name, stages=stages, rpn_convs=rpn_convs),
        class_outputs=Outputs((num_classes, *every), outputs),
        box_outputs=None if is_agnostic else Outputs(every, num_classes),
        mask_outputs=Outputs(every, num_classes) if masks > 1 else None,
        reads_bgr=backbone.endswith("_caffe") or backbone.startswith("resnext"),
        norm_epsilon=1e-5 if options.norm_epsilon is None else options.norm_epsilon,
    )
