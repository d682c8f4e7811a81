"""Faster R-CNN with Decoupling Head, ResNet-50 with NAS-FPN: the NAS-FPN family of table 4.

    python -m detection.train --config=configs/detection/r50_nas_fpn.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_nas_fpn.py:26` is the long one.
Time:     1.2 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    one of models 1 to 16, public leaderboard between 58.596 and 60.5.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_nas_fpn"
    config.model.neck = "nas_fpn"
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.box_head.kind = "decoupling"
    return config
