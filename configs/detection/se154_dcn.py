"""Faster R-CNN, SENet-154 with deformable convolutions in c3 to c5: table 2.

    python -m detection.train --config=configs/detection/se154_dcn.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `se154_dcn.py:26` is the long one.
Time:     5.1 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 71.13, public leaderboard 57.771 (multi-scale test, averaged
          parameters).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "se154_dcn"
    config.model.backbone = "senet154"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    return config
