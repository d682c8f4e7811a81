"""Whole detectors of other frameworks as detectors of ours: settings and values.

What cannot be told from the tensors comes from `Options`. Nothing may be missing; what is left over
is listed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from flax import traverse_util

from common.io.errors import UserError
from common.nn.layers.norm import Norm
from common.nn.weights.backbone_weights import LoadReport, State
from common.training.step import variable_shapes
from configs.detection import base
from detection.batch_fields import init_shapes
from detection.foreign import detectron2, mmdetection, torchvision
from detection.foreign.arrays import LEAVES, Layout
from detection.foreign.coco import CATEGORIES
from detection.foreign.family import Foreign, Options
from detection.models.faster_rcnn import build
from detection.settings import RunSettings, read_run

_READS_POOLED = r"(?:\w+_)?fc1|offset_fc"  # dense layers of flattened pooled features
Describe = Callable[[State, Options], Foreign]
NO_OPTIONS = Options()


@dataclasses.dataclass(frozen=True)
class Converted:
    """A detector of another framework as one of ours.

    Attributes:
      foreign: what it was.
      settings: of a run that it could be the result of.
      weights: by '/'-joined path of params and batch_stats.
      report: what became of its tensors.
    """

    foreign: Foreign
    settings: RunSettings
    weights: State
    report: LoadReport


def convert_detector(state: State, options: Options = NO_OPTIONS) -> Converted:
    """Our detector of the state dict of another framework.

    Raises:
      UserError: a model that is not known, a tensor of another shape than it should have, or a
        missing one.
    """
    describe, state = recognise(state)
    foreign = describe(state, options)
    settings = read_run(make_config(foreign.changes))
    layouts = array_layouts(foreign, settings)
    weights: State = {}
    missing = []
    names = {path: their_array(foreign, path) for path in layouts}
    for path, layout in layouts.items():
        value = state.get(names[path])
        if value is None:
            missing.append(f"{path} (as {names[path]})")
            continue
        if value.shape != layout.their_shape:
            raise UserError(
                f"{names[path]}: found shape {value.shape}, expected {layout.their_shape} "
                f"for {path}"
            )
        weights[path] = layout.to_ours(value)
    known = set(names.values())
    report = LoadReport(list(weights), [name for name in state if name not in known], missing)
    if missing:
        raise UserError(
            f"found no value for {len(missing)} arrays, first {missing[0]}; expected all of "
            f"{foreign.family}'s {settings.model.backbone} detector"
        )
    return Converted(foreign, settings, weights, report)


def recognise(state: State) -> tuple[Describe, State]:
    """What describes the detector, and its state dict with the names of today.

    Raises:
      UserError: names of no family.
    """

    def has(*beginnings: str) -> bool:
        return all(any(name.startswith(beginning) for name in state) for beginning in beginnings)

    if has("backbone.body.", "backbone.fpn.", "rpn.head.", "roi_heads."):
        return torchvision.describe, torchvision.modern(state)
    if has("backbone.bottom_up.", "backbone.fpn_", "proposal_generator.", "roi_heads."):
        return detectron2.describe, state
    if has("backbone.layer1.", "neck.", "rpn_head.rpn_conv."):
        return mmdetection.describe, state
    raise UserError(
        f"found tensors such as {next(iter(state), 'none')!r}, expected a whole two-stage detector "
        "with a feature pyramid, of torchvision, detectron2 or mmdetection"
    )


def make_config(changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """configs/detection/base.py with changes by dotted name, in float32."""
    config = base.get_config("12")
    config.name = "converted"
    config.model.dtype = "float32"
    config.data.sampler = "uniform"
    config.evaluation.metric = "coco"
    config.evaluation.expand_predictions = False
    for field, value in changes.items():
        parent, _, name = field.rpartition(".")
        config_of = config
        for part in parent.split("."):
            config_of = config_of[part]
        if isinstance(value, dict):
            config_of[name].update(value)
        else:
            config_of[name] = value
    if config.model.mask_head.kind != "none":
        config.data.mask_size = 112
        config.evaluation.metric = "coco_masks"
    return config


def array_layouts(foreign: Foreign, settings: RunSettings) -> dict[str, Layout]:
    """How each of our arrays lies in the other framework, by path."""
    model = build(settings.model, foreign.num_classes)
    shapes = traverse_util.flatten_dict(variable_shapes(model, init_shapes(settings.data)), sep="/")
    head = settings.model.box_head
    channels = head.convs.width if head.convs.count else settings.model.fpn_channels

    def layout(path: str, shape: tuple[int, ...]) -> Layout:
        *modules, layer, leaf = path.split("/")
        fields: dict[str, Any] = {}
        if layer == "classifier":
            fields["outputs"] = foreign.class_outputs
        elif layer == "regressor" and foreign.box_outputs is not None:
            fields["outputs"] = foreign.box_outputs.repeated(4)
        elif layer == "predictor":
            fields["outputs"] = foreign.mask_outputs
            fields["pointwise"] = leaf == "kernel"
        elif layer == "deconv":
            fields["transposed"] = leaf == "kernel"
        elif leaf == "kernel" and re.fullmatch(_READS_POOLED, layer):
            fields["pooled"] = (channels, head.pool_size)
        elif path == "params/backbone/stem/conv/kernel":
            fields["reversed_inputs"] = foreign.reads_bgr
        elif leaf == "var" and modules[1] == "backbone":
            fields["shift"] = Norm.epsilon - foreign.norm_epsilon
        return Layout(shape, **fields)

    return {path: layout(path, value.shape) for path, value in shapes.items()}


def their_array(foreign: Foreign, path: str) -> str:
    """Name of one of our arrays in the other framework."""
    module, _, leaf = path.partition("/")[2].rpartition("/")
    return f"{foreign.their_name(module)}.{LEAVES[leaf]}"


def class_names(foreign: Foreign, given: Sequence[str] | None) -> list[str]:
    """Labels of the classes, in the order of the outputs.

    Raises:
      UserError: they are not COCO's 80 and were not given, or others were given.
    """
    if given is not None and len(given) == foreign.num_classes:
        return list(given)
    if given is None and foreign.num_classes == len(CATEGORIES):
        return list(CATEGORIES.values())
    found = "none" if given is None else f"{len(given)} of them"
    raise UserError(
        f"--classes: found {found}, expected a CSV file with the labels of the detector's "
        f"{foreign.num_classes} classes"
    )


def variables_of(weights: State) -> dict[str, Any]:
    """{'params', 'batch_stats'} of flat weights."""
    return traverse_util.unflatten_dict(
        {path: np.asarray(value) for path, value in weights.items()}, sep="/"
    )
