"""The 28 models of the winning ensemble (table 4), by number.

    python -m detection.train --config=configs/detection/winners.py:17 --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: as the family's file says, 2 images a device.
Schedule: 13 or 26 epochs, as listed below.
Paper:    models 1 to 16 58.596 to 60.5 on the public leaderboard; all 28 with 3 experts 67.2.

The paper says: families ResNet, SENet, ResNeXt, NASNet, NAS-FPN and EfficientNet "with the best
setting and design", 13 or 26 epochs, decoupled backbone for 25 to 28, and that 17 to 28 are trained
without the photos that the auto ensemble is searched on (give them a dataset directory whose
training split leaves those out: `scripts.prepare_data --splits=FILE.json`). It says neither which
model has which number nor which have a Decoupling Head: the list below is a reading, in which all
have one, since it is the best setting of table 2.
"""

import importlib

import ml_collections

from configs.detection import base

# family's file, epochs, backbone if another one, decoupled heads in the paper's four stages
MODELS = (
    ("x101_dcn_dh", 13, None, False),
    ("x101_dcn_dh", 26, None, False),
    ("se154_dcn_dh", 13, None, False),
    ("se154_dcn_dh", 26, None, False),
    ("x101_dcn_dh", 13, "resnext152_32x8d", False),
    ("x101_dcn_dh", 26, "resnext152_32x8d", False),
    ("x101_dcn_dh", 13, "resnet101", False),
    ("x101_dcn_dh", 13, "resnet152", False),
    ("x101_dcn_dh", 13, "seresnet152", False),
    ("x101_dcn_dh", 13, "seresnext101_32x4d", False),
    ("x101_dcn_dh", 13, None, True),
    ("se154_dcn_dh", 13, None, True),
    ("nasnet", 26, None, False),
    ("r50_nas_fpn", 26, None, False),
    ("efficientnet", 26, None, False),
    ("efficientnet", 26, "efficientnet_b7", False),
    ("x101_dcn_dh", 26, None, False),
    ("x101_dcn_dh", 26, "resnext152_32x8d", False),
    ("se154_dcn_dh", 26, None, False),
    ("se154_dcn_dh", 13, None, True),
    ("x101_dcn_dh", 13, "resnext152_32x8d", True),
    ("nasnet", 26, None, False),
    ("r50_nas_fpn", 26, "resnet101", False),
    ("efficientnet", 26, None, False),
    ("decoupled", 13, None, False),
    ("decoupled", 26, None, False),
    ("decoupled", 13, "resnext152_32x8d", False),
    ("decoupled", 13, "resnet152", False),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of the model, "1" (default) to "28"."""
    number = int(arg or 1)
    if not 1 <= number <= len(MODELS):
        raise ValueError(f"winners.py:{arg}: found model {number}, expected 1 to {len(MODELS)}")
    family, epochs, backbone, cascade = MODELS[number - 1]
    config = _family(family).get_config(str(epochs))
    config.name = f"winner{number}"
    if backbone:
        config.model.backbone = backbone
    if cascade:
        config.model.stages = base.FOUR_STAGES
    return config


def _family(name: str):
    return importlib.import_module(f"configs.detection.{name}")
