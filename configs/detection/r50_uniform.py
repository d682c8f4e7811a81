"""Faster R-CNN, ResNet-50 with FPN, images drawn uniformly: first row of the paper's table 1.

    python -m detection.train --config=configs/detection/r50_uniform.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_uniform.py:26` is the long one.
Time:     1.2 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 58.88, 64.64 with class-aware sampling (r50.py). Table 1 says so of
          an X50: --config.model.backbone=resnext50_32x4d; 64.64 is ResNet-50's in table 2.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_uniform"
    config.data.sampler = "uniform"
    return config
