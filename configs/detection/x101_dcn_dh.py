"""Decoupling Head on ResNeXt-101 64x4d with deformable convolutions: table 2.

    python -m detection.train --config=configs/detection/x101_dcn_dh.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `x101_dcn_dh.py:26` is the long one.
Time:     3.9 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 71.71, public leaderboard 58.596 (multi-scale test, averaged
          parameters).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "x101_dcn_dh"
    config.model.backbone = "resnext101_64x4d"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.box_head.kind = "decoupling"
    return config
