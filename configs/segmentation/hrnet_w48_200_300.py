"""HRNet-W48 on boxes with a random short side from 200 to 300, trained on 400,000 of the boxes.

    python -m segmentation.train --config=configs/segmentation/hrnet_w48_200_300.py
        --config.data.dir=DIR --workdir=WORK

Hardware: any number N of accelerators with 6 crops each (--config.data.batch_size=6N; 48 here).
Schedule: 200,000 steps, learning rate 0.08 at any batch size, falling as (1 - step / steps)^0.9.
Paper:    public leaderboard 49.02, on detections weaker than those of the other rows (table 5).
"""

import ml_collections

from configs.segmentation import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: as of hrnet_w48_256."""
    config = base.get_config("200_300", arg)
    config.name = "hrnet_w48_200_300"
    config.data.batch_size = 48
    config.data.max_instances = 400_000
    return config
