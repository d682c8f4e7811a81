"""Decoupling Head on SENet-154 with deformable convolutions: table 2's best single model.

    python -m detection.train --config=configs/detection/se154_dcn_dh.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `se154_dcn_dh.py:26` is the long one.
Time:     5.2 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 72.19, public leaderboard 60.5 (multi-scale test, averaged
          parameters).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "se154_dcn_dh"
    config.model.backbone = "senet154"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.box_head.kind = "decoupling"
    return config
