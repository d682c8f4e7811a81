"""Mask R-CNN, ResNet-50 with FPN, COCO: what LVIS runs of this backbone start from.

    python -m detection.train --config=configs/detection/coco_mask_r50.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

DIR is written by `scripts.prepare_data coco`.

Hardware: any number N of accelerators with 2 images each (--config.data.batch_size=2N; 16 here).
Schedule: 12 epochs, learning rate 0.02 for 16 photos, x 0.1 at epochs 8 and 11; another number of
          epochs after a colon, such as `coco_mask_r50.py:24`.
Time:     some 6.7 h on a v3-8, an estimate: 2.1 TFLOP a photo at a quarter of its peak;
          `scripts.plan_pod --nocompile --slice=v3-8 --num_classes=80 --photos=118287` says more.
Paper:    gives no figure of it.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "12" by default."""
    config = base.get_config(arg or "12")
    config.name = "coco_mask_r50"
    config.data.train_split = "train2017"
    config.data.eval_split = "val2017"
    config.data.sampler = "uniform"
    config.data.batch_size = 16
    config.data.scales = (640, 672, 704, 736, 768, 800)
    config.data.mask_size = 112
    config.model.mask_head.kind = "class_specific"
    config.model.detections.max_detections = 100
    config.optimizer.learning_rate_per_image = 0.00125
    config.optimizer.warmup_steps = 1000
    config.evaluation.metric = "coco_masks"
    return config
