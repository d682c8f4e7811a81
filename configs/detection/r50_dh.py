"""Faster R-CNN with Decoupling Head, ResNet-50 with FPN: table 2.

    python -m detection.train --config=configs/detection/r50_dh.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_dh.py:26` is the long one.
Time:     1.3 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 68.18, public leaderboard 52.55 (55.88 with multi-scale test);
          64.64 and 49.79 without the head (r50.py).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_dh"
    config.model.box_head.kind = "decoupling"
    return config
