"""The trainings behind table 1 of the LVIS 2019 solution, by name.

    python -m detection.train --config=configs/detection/lvis_winner.py:lvis_x101
        --config.data.dir=DIR --config.init_from=COCO_RUN --workdir=WORK

    coco_x101, coco_se154    what the others start from; coco_x101 is the expert for COCO, too
    lvis_x101                the challenge's baseline, row 1
    lvis_se154               row 2
    lvis_se154_openimages    row 3; `lvis_winner.py:lvis_se154_openimages:OPENIMAGES` tells the
                             dataset directory of OpenImages
    openimages_x101          expert for the classes shared with OpenImages V5

`scripts.lvis_road_map` runs them in this order, and tests and ensembles of them for the other rows.
Paper: mask AP on v0.5 validation 30.1, 30.8, 31.4 (rows 1 to 3), 32.3 with boxes of several scales,
35.1 with re-scoring and experts, 36.4 with masks of several scales. It says that rows 2 and 3 add a
SENet-154 and OpenImages; that each is one network is a reading, and so are the experts' backbones.
"""

import importlib

import ml_collections

# name -> file of the family, and the backbone that it gets
TRAININGS = {
    "coco_x101": ("coco_mask_r50", "resnext101_64x4d"),
    "lvis_x101": ("lvis_x101", ""),
    "coco_se154": ("coco_mask_r50", "senet154"),
    "lvis_se154": ("lvis_se154", ""),
    "lvis_se154_openimages": ("lvis_x101_openimages", "senet154"),
    "openimages_x101": ("x101_dcn", ""),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: a name of TRAININGS, "lvis_x101" by default, and after a colon the family's own."""
    name, _, rest = (arg or "lvis_x101").partition(":")
    if name not in TRAININGS:
        raise ValueError(f"lvis_winner.py:{arg}: expected one of {', '.join(TRAININGS)}")
    family, backbone = TRAININGS[name]
    module = importlib.import_module(f"configs.detection.{family}")
    config = module.get_config(rest or None)
    config.name = name
    if backbone:
        config.model.backbone = backbone
        config.model.deform = (1, 1, 1)
        config.model.norm = "sync"
        config.model.remat = True
    return config
