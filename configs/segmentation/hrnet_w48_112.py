"""HRNet-W48 on boxes brought to 112x112, whatever their aspect.

    python -m segmentation.train --config=configs/segmentation/hrnet_w48_112.py
        --config.data.dir=DIR --workdir=WORK

Hardware: any number N of accelerators with 16 crops each (--config.data.batch_size=16N; 128 here).
Schedule: 200,000 steps, learning rate 0.08 at any batch size, falling as (1 - step / steps)^0.9.
Paper:    public leaderboard 53.02 (table 5).
"""

import ml_collections

from configs.segmentation import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: as of hrnet_w48_256."""
    config = base.get_config("112", arg)
    config.name = "hrnet_w48_112"
    config.data.batch_size = 128
    config.evaluation.batch_size = 128
    return config
