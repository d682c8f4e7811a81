"""What is known of a detector of another framework, before its values are read.

A family is a framework whose checkpoints name their tensors alike. Its module here (`torchvision`,
`detectron2`, `mmdetection`) finds out from names and shapes which detector a state dict is of, and
says where each array of ours lies in it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.io.errors import UserError
from common.nn.backbones.resnet import RESNETS, BasicBlock
from common.nn.weights.backbone_weights import State
from detection.foreign.arrays import Outputs
from detection.foreign.coco import CATEGORIES, LAST_ID


@dataclasses.dataclass(frozen=True)
class Options:
    """What the tensors do not say; None: what is usual in the family.

    Attributes:
      style: "caffe": strides in the first 1x1 convolutions, and pixels blue, green, red in units of
        1; "pytorch": strides in the 3x3 ones.
      norm_epsilon: of the frozen norms of the backbone.
      num_classes: of the class list that the user gave, None without.
    """

    style: str | None = None
    norm_epsilon: float | None = None
    num_classes: int | None = None


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A detector of another framework.

    Attributes:
      family: of its framework, for the report.
      num_classes: K, those that become ours.
      changes: fields of configs/detection/base.py, by dotted name, that make it our detector.
      their_name: the name in the state dict of one of our modules, such as `box_head/fc1`.
      class_outputs: of its classifier, of which ours are background and the K classes.
      box_outputs: of the classes that have boxes; None: all share one.
      mask_outputs: of the classes that have masks; None: all share one, or there are none.
      reads_bgr: its first layer reads blue, green, red.
      norm_epsilon: of the frozen norms of its backbone.
      notes: what was assumed.
    """

    family: str
    num_classes: int
    changes: Mapping[str, Any]
    their_name: Callable[[str], str]
    class_outputs: Outputs
    box_outputs: Outputs | None
    mask_outputs: Outputs | None
    reads_bgr: bool = False
    norm_epsilon: float = 1e-5
    notes: tuple[str, ...] = ()


# Our modules are FAMILY_PART/LAYER: the part may be one of several, the layer, too.
_MODULE = re.compile(
    r"(neck|rpn_head|box_head|mask_head)(\d*)/(?:(sibling)/)?([a-z_]*?)(\d*)(_norm)?"
)


@dataclasses.dataclass(frozen=True)
class Module:
    """One of our modules outside the backbone, taken apart.

    Attributes:
      part: neck, rpn_head, box_head or mask_head.
      stage: of a cascade, from 0.
      sibling: whether it is of the plain head beside a Decoupling Head.
      layer: such as lateral, conv, fc, classifier.
      number: of the layer: the level of a pyramid, else counted from 1.
      norm: whether it is the norm of a pyramid's layer.
    """

    part: str
    stage: int
    sibling: bool
    layer: str
    number: int
    norm: bool


def taken_apart(name: str) -> Module:
    """`box_head2/fc1` -> part box_head, stage 1, layer fc, number 1."""
    match = _MODULE.fullmatch(name)
    assert match is not None, name
    part, stage, sibling, layer, number, norm = match.groups()
    return Module(
        part, int(stage or 1) - 1, sibling is not None, layer, int(number or 1), norm is not None
    )


def backbone_name(module: str) -> str:
    """Name of one of our backbone's modules in torchvision's ResNets, and in mmdetection's."""
    if match := re.fullmatch(r"backbone/stem/(conv|norm)", module):
        return {"conv": "conv1", "norm": "bn1"}[match[1]]
    match = re.fullmatch(r"backbone/stage(\d)/block(\d+)/(.+)", module)
    assert match is not None, module
    layer = (
        match[3]
        .replace("downsample_conv", "downsample.0")
        .replace("downsample_norm", "downsample.1")
    )
    return f"layer{match[1]}.{match[2]}.{re.sub('^norm', 'bn', layer)}"


def shape(state: State, name: str) -> tuple[int, ...]:
    """Shape of a tensor.

    Raises:
      UserError: there is none of this name.
    """
    if name not in state:
        raise UserError(f"found no tensor {name!r}, expected one")
    return state[name].shape


def count(state: State, pattern: str) -> int:
    """How many different numbers the first group of `pattern` has at the start of the names."""
    return len({int(m[1]) for name in state if (m := re.match(pattern, name))})


def norm_kind(state: State, name: str) -> str:
    """Kind of the norm `name`: none, group, or frozen where it has statistics."""
    if f"{name}.weight" not in state:
        return "none"
    return "frozen" if f"{name}.running_mean" in state else "group"


def resnet_name(state: State, block: str, conv2: str, style: str | None) -> str:
    """Our name of the backbone.

    Args:
      state: whose names are matched.
      block: pattern of the names of blocks, with groups for stage and number.
      conv2: name of the second convolution of the first block.
      style: "caffe" or "pytorch"; None: "caffe" unless convolutions have groups.

    Raises:
      UserError: a network that we lack.
    """
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(block, name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    outputs, inputs = shape(state, f"{conv2}.weight")[:2]
    groups = outputs // inputs
    style = style or ("caffe" if groups == 1 else "pytorch")
    is_basic = f"{conv2.removesuffix('2')}3.weight" not in state
    for name, layout in RESNETS.items():
        wanted = (layout.depths, layout.block is BasicBlock, layout.groups)
        base = layout.base_width if groups > 1 else inputs
        if wanted == (depths, is_basic, groups) and base == inputs:
            if name.endswith("_caffe") == (style == "caffe"):
                return name
    raise UserError(
        f"found a {style}-style backbone of {depths} blocks, {groups} groups of {inputs} channels, "
        "expected one of the ResNets in common.nn.backbones.resnet"
    )


def split_classes(found: int, options: Options) -> tuple[int, tuple[int, ...]]:
    """K, and the places of our classes among `found` classes of a model (background apart).

    Of 90, COCO's ids, those are ours that a class has.
    """
    if found == LAST_ID and options.num_classes in (None, len(CATEGORIES)):
        return len(CATEGORIES), tuple(number - 1 for number in CATEGORIES)
    return found, tuple(range(found))


def cascade(stds: Sequence[Sequence[float]], weights: Sequence[float], average: str) -> dict:
    """`config.model.stages` of a cascade of three."""
    return dict(
        iou=(0.5, 0.6, 0.7),
        stds=tuple(map(tuple, stds)),
        loss_weights=tuple(weights),
        score_weights=(1.0, 1.0, 1.0),
        average=average,
    )
