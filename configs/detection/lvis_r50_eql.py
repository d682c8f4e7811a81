"""Mask R-CNN, ResNet-50 with FPN, LVIS v0.5, equalization loss.

    python -m detection.train --config=configs/detection/lvis_r50_eql.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK

Rare and common classes, those on fewer than 0.177 % of the annotated photos, get no negative
gradient from objects of other classes.
LVIS v1: --config.model.box_head.classifier.eql.threshold=0.0011

Hardware: any number N of accelerators with 2 images each (--config.data.batch_size=2N; 16 here).
Schedule: 25.4 epochs of 56,740 photos (90,000 steps of 16), learning rate 0.02 for 16 photos, x 0.1
          after 16.9 and 22.6; short sides 640 to 800.
Time:     some 6.8 h on a v3-8, an estimate: 2.1 TFLOP a photo at a quarter of its peak;
          `scripts.plan_pod --nocompile --slice=v3-8 --num_classes=1230 --photos=56740` says more.
Release:  mask AP 24.0, rare 9.4, common 25.2, frequent 28.4 on v0.5 validation. Not measured here.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    del arg
    config = base.get_config()
    config.name = "lvis_r50_eql"
    config.data.sampler = "uniform"
    config.data.eval_split = "val"
    config.data.batch_size = 16
    config.data.scales = (640, 672, 704, 736, 768, 800)
    config.data.mask_size = 112
    config.model.mask_head.kind = "class_specific"
    config.model.box_head.classifier.kind = "eql"
    config.model.detections.score_threshold = 1e-4
    config.optimizer.learning_rate_per_image = 0.00125
    config.optimizer.warmup_steps = 1000
    config.optimizer.num_epochs = 25.4
    config.optimizer.decay_epochs = (16.9, 22.6)
    config.evaluation.metric = "lvis_masks"
    return config
