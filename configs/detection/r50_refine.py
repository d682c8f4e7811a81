"""Regressor-only cascade, ResNet-50 with FPN: moves the boxes of a detections table onto objects.

    python -m detection.train --config=configs/detection/r50_refine.py --config.data.dir=DIR
        --config.data.proposals=train.parquet --config.model.pretrained=FILE --workdir=WORK
    python -m detection.export --config=configs/detection/r50_refine.py --config.data.dir=DIR
        --workdir=WORK --proposals=x.parquet --output=refined.parquet

train.parquet: detections on training photos, best of a detector that was not trained on them.
Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `r50_refine.py:26` is the long one.
Time:     1.1 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    "refined detection", the boxes that its segmentation track starts from.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "r50_refine"
    config.data.max_proposals = 300
    config.data.group_of = "drop"
    config.model.stages = base.THREE_STAGES
    config.model.box_head.kind = "regressor"
    # Only regions of IoU >= that of the stage have something to learn from.
    config.model.box_head.sample = dict(num_samples=256, positive_fraction=1.0)
    config.model.box_head.loss.normaliser = "positive"
    config.optimizer.learning_rate_per_image = 0.001  # the loss is a mean over positives alone
    return config
