"""Cascade R-CNN with three stages, ResNet-50 with FPN: the standard cascade.

    python -m detection.train --config=configs/detection/r50_cascade.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_cascade.py:26` is the long one.
Time:     1.8 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    the cascade of r50_cascade4.py is 0.7 mAP better (section 5.6).
"""

import ml_collections

from configs.detection import r50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = r50.get_config(arg)
    config.name = "r50_cascade"
    config.model.stages = dict(
        iou=(0.5, 0.6, 0.7),
        stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
        loss_weights=(1.0, 0.5, 0.25),
        score_weights=(1.0, 1.0, 1.0),
        average="probability",
        box_stage=-1,
    )
    return config
