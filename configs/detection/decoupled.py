"""Decoupled backbone with Decoupling Heads on SENet-154: models 25 to 28 (section 5.2).

    python -m detection.train --config=configs/detection/decoupled.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `decoupled.py:26` is the long one.
Time:     9.0 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    models 17 to 28 and one expert reach up to 63.596 on the public leaderboard (table 4).

The branches part after stride 8; --config.model.split_after=c2 parts them before.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "decoupled"
    config.model.backbone = "senet154"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.box_head.kind = "decoupling"
    config.model.split_after = "c3"
    return config
