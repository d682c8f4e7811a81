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

from configs.detection import r50_cascade


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = r50_cascade.get_config(arg)
    config.name = "r50_refine"
    config.data.proposals = ""  # detections table of the training photos; labels do not matter
    config.data.max_proposals = 300  # of a photo at a time; training takes the best
    config.data.group_of = "drop"
    config.evaluation.proposals = ""  # table of the evaluation split to refine and score
    config.model.box_head = dict(
        kind="regressor",  # no classes, one box a region
        width=1024,
        pool_size=7,
        aligned=True,
        # Only regions of IoU >= that of the stage have something to learn from.
        sample=dict(num_samples=256, positive_fraction=1.0),
        loss=dict(beta=1.0, normaliser="positive", target_gradient=False),
    )
    config.model.truth_jitter = dict(
        copies=0,  # moved copies of each ground-truth box beside the table's boxes
        shift=0.1,  # standard deviations: of the centre, in sides of the box
        scale=0.2,  # of the logarithm of each side's factor
    )
    config.model.loss_weights = dict(box_regression=1.0)
    config.optimizer.learning_rate_per_image = 0.001  # the loss is a mean over positives alone
    for unused in ("anchors", "rpn", "detections", "drop_background_rois", "low_weight"):
        del config.model[unused]
    del config.test_time
    return config
