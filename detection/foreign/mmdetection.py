"""mmdetection's Faster, Mask and Cascade R-CNN with FPN, of version 1 and later, and TSD's release.

Version 1, of which TSD's release is a fork, counts a box to its last pixel: as half-open boxes,
which ours are, its arithmetic is the usual one, with rounded anchors in the middle of cells and
unaligned RoIAlign of two samples an axis. Background is its first class, with outputs for boxes and
masks that nothing reads. From version 2 on, background is last, anchors lie on the corners of cells
and RoIAlign takes as many samples as a region has cells. Cascades average logits.
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
    backbone_name,
    cascade,
    count,
    norm_kind,
    resnet_name,
    shape,
    taken_apart,
)

_BLOCK = r"backbone\.layer(\d)\.(\d+)\."
CHANGES: Mapping[str, Any] = {
    "model.norm": "frozen",
    "model.detections.score_threshold": 0.05,
    "model.detections.max_detections": 100,
}
_FIRST_VERSION: Mapping[str, Any] = {
    "model.anchors.rounded": True,
    "model.rpn.loss.beta": 1 / 9,
    "model.box_head.aligned": False,
    "model.box_head.loss.beta": 1.0,
}
_LATER: Mapping[str, Any] = {
    "model.anchors.centre": 0.0,
    "model.rpn.loss.beta": 0.0,
    "model.rpn.train_proposals": dict(pre_nms=2000, post_nms=1000, nms_iou=0.7),
    "model.box_head.sampling_ratio": 0,
    "model.box_head.loss.beta": 0.0,
}
_TSD: Mapping[str, Any] = {
    "model.box_head.kind": "decoupling",
    "model.box_head.sample_mode": "edge",
    "model.box_head.offsets.offset_init": "release",
    "model.box_head.margin": dict(class_margin=0.3, box_margin=0.3),
    "model.detections.score_threshold": 0.0,
}
_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
_CAFFE_MEAN = (122.7717, 115.9465, 102.9801)  # red, green, blue; of version 1
_TSD_NAMES = {
    "offset_fc": "shared_fc.0",
    "bin_offset_fc": "delta_c.0",
    "bin_offsets": "delta_c.2",
    "box_offset_fc": "delta_r.0",
    "box_offset": "delta_r.2",
    "classifier": "TSD_fc_cls",
    "regressor": "TSD_fc_reg",
}


def their_name(name: str, root: str, stages: int, masks: int, norm: str, is_tsd: bool) -> str:
    """Name of one of our modules.

    Args:
      name: of ours.
      root: before the names of heads.
      stages: box heads.
      masks: mask heads.
      norm: what norms of convolutions outside the backbone are called.
      is_tsd: whether box heads are TSD's.
    """
    if name.startswith("backbone/"):
        return "backbone." + backbone_name(name)
    module = taken_apart(name)
    layer, place = module.layer, module.number - 1
    if module.part == "neck":
        convs = {"lateral": "lateral_convs", "output": "fpn_convs"}[layer]
        return f"neck.{convs}.{place - 1}.{norm if module.norm else 'conv'}"
    if module.part == "rpn_head":
        return (
            "rpn_head." + {"conv": "rpn_conv", "objectness": "rpn_cls", "deltas": "rpn_reg"}[layer]
        )
    if module.part == "mask_head":
        names = {
            "conv": f"convs.{place}.conv",
            "norm": f"convs.{place}.{norm}",
            "deconv": "upsample",
            "predictor": "conv_logits",
        }
        return f"{root}mask_head{f'.{module.stage}' if masks > 1 else ''}.{names[layer]}"
    names = {
        "conv": f"shared_convs.{place}.conv",
        "norm": f"shared_convs.{place}.{norm}",
        "fc": f"shared_fcs.{place}",
        "classifier": "fc_cls",
        "regressor": "fc_reg",
    }
    if is_tsd and not module.sibling:
        names = {**_TSD_NAMES, "class_fc": f"TSD_pc_fcs.{place}", "box_fc": f"TSD_pr_fcs.{place}"}
    return f"{root}bbox_head{f'.{module.stage}' if stages > 1 else ''}.{names[layer]}"


def describe(state: State, options: Options) -> Foreign:
    """What the state dict is of.

    Raises:
      UserError: a tensor is missing that tells, or a part that we lack.
    """
    is_later = any(name.startswith("roi_head.") for name in state)
    root = "roi_head." if is_later else ""
    stages = count(state, rf"{root}bbox_head\.(\d)\.") or 1
    if stages not in (1, 3):
        raise UserError(f"found a cascade of {stages} box heads, expected 1 or 3")
    head = f"{root}bbox_head{'.0' if stages > 1 else ''}"
    is_tsd = f"{head}.TSD_fc_cls.weight" in state
    outputs, width = shape(state, f"{head}.fc_cls.weight")
    num_classes = outputs - 1
    # Where background is first, boxes and masks have outputs for it.
    every = tuple(range(num_classes) if is_later else range(1, outputs))
    classes = Outputs(every, num_classes if is_later else outputs)
    is_agnostic = shape(state, f"{head}.fc_reg.weight")[0] == 4
    style = options.style or "pytorch"
    backbone = resnet_name(state, _BLOCK, "backbone.layer1.0.conv2", style)
    changes = {
        **CHANGES,
        **(_LATER if is_later else _FIRST_VERSION),
        **(_TSD if is_tsd else {}),
        "model.backbone": backbone,
        "model.fpn_channels": shape(state, "neck.lateral_convs.0.conv.weight")[0],
        "model.fpn_norm": norm_kind(state, f"neck.lateral_convs.0.{_norm(state)}"),
        "model.box_head.width": width,
        "model.box_head.class_agnostic": is_agnostic,
        "model.box_head.num_fcs": count(state, rf"{re.escape(head)}\.shared_fcs\.(\d)\."),
    }
    if style == "caffe" and not is_later:
        changes["model.pixel_mean"] = _CAFFE_MEAN
    if stages > 1:
        weights = (1.0, 1.0, 1.0) if is_tsd else (1.0, 0.5, 0.25)
        changes["model.stages"] = cascade(_STDS, weights, "logit")
    if num_convs := count(state, rf"{re.escape(head)}\.shared_convs\.(\d)\.conv\.weight"):
        changes["model.box_head.convs"] = dict(
            count=num_convs,
            width=shape(state, f"{head}.shared_convs.0.conv.weight")[0],
            norm=norm_kind(state, f"{head}.shared_convs.0.{_norm(state)}"),
        )
    mask_heads, masks = count(state, rf"{root}mask_head\.(\d)\."), 0
    mask = f"{root}mask_head{'.0' if mask_heads else ''}"
    if num_masks := count(state, rf"{re.escape(mask)}\.convs\.(\d)\.conv\.weight"):
        masks = shape(state, f"{mask}.conv_logits.weight")[0]
        changes |= {
            "model.mask_head.kind": "class_agnostic" if masks == 1 else "class_specific",
            "model.mask_head.num_convs": num_masks,
            "model.mask_head.width": shape(state, f"{mask}.convs.0.conv.weight")[0],
            "model.mask_head.norm": norm_kind(state, f"{mask}.convs.0.{_norm(state)}"),
            "model.mask_head.stages": "all" if mask_heads else "last",
        }
    notes: tuple[str, ...] = ()
    if options.style is None:
        notes += ("style pytorch (--style=caffe for weights that start from Caffe's)",)
    if is_tsd:
        notes += (
            "TSD's release reads shifted regions of boxes rounded to whole pixels, this model of "
            "the boxes themselves: scores differ a little",
        )
    version = "2 or later" if is_later else "1"
    return Foreign(
        family="TSD" if is_tsd else f"mmdetection {version}",
        num_classes=num_classes,
        changes=changes,
        their_name=functools.partial(
            their_name, root=root, stages=stages, masks=mask_heads, norm=_norm(state), is_tsd=is_tsd
        ),
        class_outputs=Outputs(
            (num_classes, *every) if is_later else tuple(range(outputs)), outputs
        ),
        box_outputs=None if is_agnostic else classes,
        mask_outputs=classes if masks > 1 else None,
        reads_bgr=style == "caffe" or backbone == "resnext101_32x8d",
        norm_epsilon=1e-5 if options.norm_epsilon is None else options.norm_epsilon,
        notes=notes,
    )


def _norm(state: State) -> str:
    """What norms of convolutions outside the backbone are called."""
    return (
        "gn" if any(re.search(r"(?:neck|head)\..*\.gn\.weight$", name) for name in state) else "bn"
    )
