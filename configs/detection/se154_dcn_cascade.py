"""The paper's cascade on SENet-154 with deformable convolutions: one of table 3's four models.

    python -m detection.train --config=configs/detection/se154_dcn_cascade.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `se154_dcn_cascade.py:26` is the long one.
Time:     6.1 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    part of the four-model ensemble, public leaderboard 57.994.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "se154_dcn_cascade"
    config.model.backbone = "senet154"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.update(base.EIGHTEEN_ANCHORS)
    config.model.stages = base.FOUR_STAGES
    return config
