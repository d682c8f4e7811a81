"""Faster R-CNN, ResNeXt-152 32x8d with deformable convolutions: one of table 3's four models.

    python -m detection.train --config=configs/detection/x152_dcn.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `x152_dcn.py:26` is the long one.
Time:     5.6 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    part of the four-model ensemble, public leaderboard 57.994.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "x152_dcn"
    config.model.backbone = "resnext152_32x8d"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    return config
