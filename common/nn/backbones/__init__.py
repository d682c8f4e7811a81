"""Backbones by name, and the pixel statistics that their public weights were trained with."""

from flax import linen as nn

from common.io.errors import UserError
from common.nn.backbones.efficientnet import EFFICIENTNETS, EfficientNet
from common.nn.backbones.hrnet import HRNETS, HRNet
from common.nn.backbones.nasnet import NASNETS, NASNet
from common.nn.backbones.resnet import RESNETS, ResNet
from common.nn.backbones.senet import SENETS

_RESIDUAL = RESNETS | SENETS
BACKBONES = (*_RESIDUAL, *EFFICIENTNETS, *HRNETS, *NASNETS)

_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# TensorFlow's lite models: efficientnet_lite_builder.py (MEAN_RGB, STDDEV_RGB)
_LITE = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
_CAFFE = ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))  # of detectron2, in the order of RGB
_NASNET = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


def make_backbone(name: str, /, **fields) -> nn.Module:
    """Returns the trunk `name` (one of `BACKBONES`).

    `fields`: norm, axis_name, frozen_stages, remat, dtype, name of all; drop_path_rate
    (EfficientNet, NASNet; 0 elsewhere); deform (networks of bottleneck blocks; zeros elsewhere);
    and those of the network's module, such as `upsampling` of HRNet. `layout` replaces the one of
    that name, e.g. NASNet's with fewer filters or cells.

    Raises:
      UserError: unknown name, or something asked of a network that has no such thing.
    """
    _check(name)
    if name not in EFFICIENTNETS and name not in NASNETS and fields.pop("drop_path_rate", 0.0):
        raise UserError(f"drop_path_rate: {name} has no stochastic depth, expected 0")
    if name in _RESIDUAL:
        return ResNet(**({"layout": _RESIDUAL[name]} | fields))
    if any(fields.pop("deform", ())):
        raise UserError(f"deform: {name} has no bottleneck blocks, expected zeros")
    if name in EFFICIENTNETS:
        return EfficientNet(name, **fields)
    if name in HRNETS:
        return HRNet(**({"layout": HRNETS[name]} | fields))
    return NASNet(**({"layout": NASNETS[name]} | fields))


def preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB pixels (0..255) that the public weights expect."""
    _check(name)
    if name in NASNETS:
        return _NASNET
    if name.endswith("_caffe"):
        return _CAFFE
    return _LITE if "lite" in name else _IMAGENET


def _check(name: str) -> None:
    if name not in BACKBONES:
        raise UserError(f"backbone: found {name!r}, expected one of {', '.join(BACKBONES)}")
