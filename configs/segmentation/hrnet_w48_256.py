"""HRNet-W48 on boxes with the short side at 256: the best single model of the segmentation track.

    python -m segmentation.train --config=configs/segmentation/hrnet_w48_256.py
        --config.data.dir=DIR --workdir=WORK
    python -m segmentation.export --config=configs/segmentation/hrnet_w48_256.py:flip
        --config.data.dir=DIR --workdir=WORK --boxes=x.parquet --output=y.parquet

Hardware: any number N of accelerators with 8 crops each (--config.data.batch_size=8N; 64 here).
Schedule: 200,000 steps, learning rate 0.08 at any batch size, falling as (1 - step / steps)^0.9.
Paper:    public leaderboard 53.30; with mirrored crops in the test, `:flip`, 54.90 (table 5).
"""

import ml_collections

from configs.segmentation import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "" (default) or "flip", which averages with the mirrored crop in the test."""
    config = base.get_config("256", arg)
    config.name = "hrnet_w48_256"
    return config
