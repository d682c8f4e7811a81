"""HRNet-W18 on boxes brought to 112x112: trained by two CPU cores within an hour.

    python -m segmentation.train --config=configs/segmentation/hrnet_w18_demo.py
        --config.data.dir=DIR --workdir=WORK

`hrnet_w18_demo.py:600` is the number of steps. For some hundreds of photos with masks.
"""

import ml_collections

from configs.segmentation import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of steps, default 600."""
    config = base.get_config("112")
    config.name = "hrnet_w18_demo"
    config.data.batch_size = 16
    config.model.backbone = "hrnet_w18"
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 50
    config.optimizer.num_steps = int(arg or 600)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 100
    config.evaluation.batch_size = 16
    config.log.every_steps = 10
    return config
