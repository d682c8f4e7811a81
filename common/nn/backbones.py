"""Backbones by name, and the pixel statistics that their public weights were trained with."""

from flax import linen as nn

from common.errors import UserError
from common.nn.efficientnet import EFFICIENTNETS, EfficientNet
from common.nn.resnet import RESNETS, ResNet

BACKBONES = (*RESNETS, *EFFICIENTNETS)

_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# TensorFlow's lite models: efficientnet_lite_builder.py (MEAN_RGB, STDDEV_RGB)
_LITE = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))


def make_backbone(name: str, **fields) -> nn.Module:
    """Returns the trunk `name` (one of `BACKBONES`).

    `fields`: norm, axis_name, frozen_stages, remat, dtype, drop_path_rate.

    Raises:
      UserError: unknown name, or stochastic depth asked of a ResNet, which has none.
    """
    _check(name)
    if name in EFFICIENTNETS:
        return EfficientNet(name, **fields)
    if fields.pop("drop_path_rate", 0.0):
        raise UserError(f"drop_path_rate: {name} has no stochastic depth, expected 0")
    return ResNet(name, **fields)


def preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB pixels (0..255) that the public weights expect."""
    _check(name)
    return _LITE if "lite" in name else _IMAGENET


def _check(name: str) -> None:
    if name not in BACKBONES:
        raise UserError(f"backbone: found {name!r}, expected one of {', '.join(BACKBONES)}")
