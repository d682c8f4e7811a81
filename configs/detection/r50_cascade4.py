"""Cascade R-CNN with the paper's four stages (section 5.6), ResNet-50 with FPN.

    python -m detection.train --config=configs/detection/r50_cascade4.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_cascade4.py:26` is the long one.
Time:     2.2 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    +0.7 mAP over the standard cascade (r50_cascade.py).

The paper gives one list of stage weights without saying of what: it serves losses and scores.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_cascade4"
    config.model.stages = base.FOUR_STAGES
    return config
