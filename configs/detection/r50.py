"""Faster R-CNN, ResNet-50 with FPN, OpenImages Challenge 2019: the paper's baseline.

    python -m detection.train --config=configs/detection/r50.py --config.data.dir=DIR --workdir=WORK

Hardware: any number N of accelerators with 2 images each (--config.data.batch_size=2N; 64 here).
Schedule: 13 epochs, learning rate 0.001 -> 0.004 N over the first epoch, x 0.1 at epochs 9 and 11;
          `r50.py:26` is the long schedule (26 epochs, drops at 18 and 22).
Time:     1.2 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    validation mAP@0.5 64.64. Table 1 says so of an X50, table 2 of a ResNet-50; the other
          reading is --config.model.backbone=resnext50_32x4d.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    return base.get_config(arg)
