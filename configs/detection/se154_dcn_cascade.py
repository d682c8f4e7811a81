"""The paper's cascade on SENet-154 with deformable convolutions: one of table 3's four models.

    python -m detection.train --config=configs/detection/se154_dcn_cascade.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: 13 epochs; `se154_dcn_cascade.py:26` is the long one.
Time:     6.1 h on a v3-512 at a quarter of its peak (`scripts.plan_pod`).
Paper:    part of the four-model ensemble, public leaderboard 57.994.
"""

import ml_collections

from configs.detection import r50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = r50.get_config(arg)
    config.name = "se154_dcn_cascade"
    config.model.backbone = "senet154"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.model.anchors.scales = (8.0, 11.0, 14.0)
    config.model.anchors.ratios = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    config.model.stages = dict(
        iou=(0.5, 0.5, 0.6, 0.7),
        stds=(
            (0.1, 0.1, 0.2, 0.2),
            (0.1, 0.1, 0.2, 0.2),
            (0.05, 0.05, 0.1, 0.1),
            (0.033, 0.033, 0.067, 0.067),
        ),
        loss_weights=(0.75, 1.0, 0.25, 0.25),
        score_weights=(0.75, 1.0, 0.25, 0.25),
        average="probability",
        box_stage=-1,
    )
    return config
