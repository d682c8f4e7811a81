"""The quick start: trees on aerial photos, EfficientNet-Lite0 with FPN and Decoupling Head.

    scripts/quickstart

which, once data and weights are there, runs

    python -m detection.train --config=configs/detection/quickstart.py
        --config.data.dir=quickstart_output/dataset
        --config.model.pretrained=quickstart_output/lite0.safetensors
        --workdir=quickstart_output/run

Hardware: two CPU cores. README.md has the time and the metric as measured.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    del arg
    config = base.get_config()
    config.name = "quickstart"
    config.data.sampler = "uniform"
    config.data.batch_size = 4
    config.data.canvas = (400, 400)
    config.model.backbone = "efficientnet_lite0"
    config.model.dtype = "float32"
    config.model.fpn_channels = 64
    config.model.anchors.scales = (4.0,)  # trees are 10 to 100 pixels wide
    config.model.rpn.loss.num_samples = 128
    config.model.rpn.train_proposals = dict(pre_nms=500, post_nms=300, nms_iou=0.7)
    config.model.rpn.test_proposals = dict(pre_nms=500, post_nms=300, nms_iou=0.7)
    config.model.box_head.kind = "decoupling"
    config.model.box_head.width = 256
    config.model.box_head.sample.num_samples = 128
    config.optimizer.warmup_steps = 30
    config.optimizer.num_epochs = 22.0
    config.optimizer.decay_epochs = (17, 20)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 100
    config.checkpoint.keep_epochs = False
    config.evaluation.batch_size = 6
    config.log.every_steps = 20
    return config
