"""Mask R-CNN, ResNeXt-101 64x4d with deformable convolutions, LVIS v0.5: the challenge's baseline.

    python -m detection.train --config=configs/detection/lvis_x101.py --config.data.dir=DIR
        --config.init_from=COCO_RUN --workdir=WORK

COCO_RUN is a Mask R-CNN of the same backbone that COCO's training photos have taught
(configs/detection/lvis_winner.py:coco_x101). DIR is written by `scripts.prepare_data lvis
--ignore=instances_train2017.json`: under boxes of COCO nothing is background.

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Schedule: as lvis_r50.py; the paper says neither it nor the scales of "multi-scale training".
Time:     some 4.4 h on a v3-32, an estimate: 5.4 TFLOP a photo at a quarter of its peak;
          `scripts.plan_pod --nocompile --slice=v3-32 --num_classes=1230 --photos=56740` says more.
Paper:    mask AP 30.1, rare 19.3, common 31.8, frequent 32.3 on v0.5 validation (table 1).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    del arg
    config = base.get_config()
    config.name = "lvis_x101"
    config.data.sampler = "repeat_factor"
    config.data.eval_split = "val"
    config.data.scales = (480, 560, 640, 720, 800)
    config.data.mask_size = 112
    config.model.backbone = "resnext101_64x4d"
    config.model.deform = (1, 1, 1)
    config.model.norm = "sync"
    config.model.remat = True
    config.model.box_head.classifier.kind = "eql"
    config.model.mask_head.kind = "class_specific"
    config.model.detections.score_threshold = 1e-4
    config.optimizer.learning_rate_per_image = 0.00125
    config.optimizer.warmup_steps = 1000
    config.optimizer.num_epochs = 25.4
    config.optimizer.decay_epochs = (16.9, 22.6)
    config.evaluation.metric = "lvis_masks"
    return config
