"""A detector of ours with torchvision's names: the way back, bit for bit."""

import functools
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors_numpy

from common.io.atomic import open_atomic
from common.io.errors import UserError
from common.io.paths import PathLike
from common.nn.backbones.resnet import RESNETS
from common.nn.weights.backbone_weights import State
from detection.foreign import torchvision
from detection.foreign.arrays import Outputs
from detection.foreign.conversion import array_layouts, their_array
from detection.foreign.family import Foreign
from detection.models.settings import ModelSettings
from detection.settings import RunSettings

# Fields that change what inference computes, with what torchvision has.
_COMPUTES = {
    name: value
    for name, value in torchvision.CHANGES.items()
    if name.startswith("model.anchors.") or name == "model.box_head.aligned"
} | {"model.box_head.sampling_ratio": 2, "model.pixel_mean": (), "model.pixel_std": ()}


def to_torchvision(
    settings: RunSettings, num_classes: int, weights: State
) -> tuple[State, list[str]]:
    """The state dict of the same detector in torchvision, and where torchvision would differ.

    Boxes and masks of background, which torchvision has and nothing reads, are zeros.

    Args:
      settings: of the run.
      num_classes: of the model.
      weights: by '/'-joined path of params and batch_stats.

    Raises:
      UserError: torchvision has no such detector, or an array is missing.
    """
    refuse_others(settings.model)
    convs = settings.model.box_head.convs.count
    classes = Outputs(tuple(range(1, num_classes + 1)), num_classes + 1)
    foreign = Foreign(
        family="torchvision",
        num_classes=num_classes,
        changes={},
        their_name=functools.partial(torchvision.their_name, num_convs=convs),
        class_outputs=Outputs(tuple(range(num_classes + 1)), num_classes + 1),
        box_outputs=classes,
        mask_outputs=classes if settings.model.has_masks else None,
    )
    state = {}
    for path, layout in array_layouts(foreign, settings).items():
        if path not in weights:
            raise UserError(f"found no array {path}, expected that of {settings.name}")
        state[their_array(foreign, path)] = layout.to_theirs(weights[path])
    notes = []
    for field, theirs in _COMPUTES.items():
        ours = functools.reduce(getattr, field.split("."), settings)
        if ours != theirs:
            notes.append(f"config.{field} is {ours!r}, torchvision's {theirs!r}")
    return state, notes


def refuse_others(model: ModelSettings) -> None:
    """Checks that torchvision has the parts of a model.

    Raises:
      UserError: naming the first one that it lacks.
    """
    head, kinds = model.box_head, ("softmax", "softmax_eql")
    is_resnet = model.backbone in RESNETS and not model.backbone.endswith("_caffe")
    for holds, field, found, expected in (
        (is_resnet, "backbone", model.backbone, "a ResNet with strides in its 3x3 convolutions"),
        (model.norm != "group", "norm", model.norm, "a kind of batch norm"),
        (not any(model.deform), "deform", model.deform, "zeros"),
        (not model.split_after, "split_after", model.split_after, "''"),
        (model.neck == "fpn", "neck", model.neck, "'fpn'"),
        (model.fpn_norm != "group", "fpn_norm", model.fpn_norm, "'none' or a kind of batch norm"),
        (head.kind == "two_fc", "box_head.kind", head.kind, "'two_fc'"),
        (head.convs.norm != "group", "box_head.convs.norm", head.convs.norm, "batch norm or none"),
        (not head.class_agnostic, "box_head.class_agnostic", True, "False"),
        (
            head.classifier.kind in kinds,
            "box_head.classifier.kind",
            head.classifier.kind,
            f"one of {kinds}",
        ),
        (len(model.stages.iou) == 1, "stages.iou", model.stages.iou, "one stage"),
        (
            model.mask_head.kind != "class_agnostic",
            "mask_head.kind",
            model.mask_head.kind,
            "'none' or 'class_specific'",
        ),
    ):
        if not holds:
            raise UserError(
                f"config.model.{field}: found {found!r}, expected {expected} for torchvision"
            )


def save_state(path: PathLike, state: State) -> None:
    """Writes a state dict as `.safetensors`, or by torch as `.pth` or `.pt`, atomically.

    Raises:
      UserError: another ending, torch is not installed, or the file cannot be written.
    """
    ending = Path(path).suffix
    if ending not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"--output={path}: expected a name that ends with .safetensors or .pth")
    if ending == ".safetensors":
        with open_atomic(path, "wb") as file:
            file.write(safetensors_numpy.save(state))
        return
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--output={path}: torch is not installed, which writes such files; expected a name "
            "that ends with .safetensors, or pip install torch"
        ) from error
    with open_atomic(path, "wb") as file:
        torch.save({name: torch.from_numpy(np.array(x)) for name, x in state.items()}, file)
