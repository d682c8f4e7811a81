"""Faster R-CNN with Decoupling Head on EfficientNet-B4: the EfficientNet family of table 4.

    python -m detection.train --config=configs/detection/efficientnet.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `efficientnet.py:26` is the long one.
Time:     1.0 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    one of models 1 to 16, public leaderboard between 58.596 and 60.5.

Other members: --config.model.backbone=efficientnet_b0 to efficientnet_b7.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "efficientnet"
    config.model.backbone = "efficientnet_b4"
    config.model.drop_path_rate = 0.2
    config.model.fpn_norm = "sync"  # its taps have no activation and are large
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.box_head.kind = "decoupling"
    return config
