"""Cascade R-CNN with three stages, ResNet-50 with FPN: the standard cascade.

    python -m detection.train --config=configs/detection/r50_cascade.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_cascade.py:26` is the long one.
Time:     1.8 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    the cascade of r50_cascade4.py is 0.7 mAP better (section 5.6).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_cascade"
    config.model.stages = base.THREE_STAGES
    return config
