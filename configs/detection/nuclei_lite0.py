"""Boxes and masks from one model: cell nuclei, EfficientNet-Lite0 with FPN and a mask head.

    scripts/mask_demo

which, once data and weights are there, runs

    python -m detection.train --config=configs/detection/nuclei_lite0.py
        --config.data.dir=mask_demo_output/dataset
        --config.model.pretrained=mask_demo_output/lite0.safetensors
        --workdir=mask_demo_output/detector

Hardware: two CPU cores; 3 min 48 s of CPU time. Mask AP of the 39 nuclei of the validation tiles
53.6 (AP50 83.4), box AP 52.7 (docs/results.md).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of steps, "150" (default)."""
    steps = int(arg or 150)
    config = base.get_config()
    config.name = "nuclei_lite0"
    config.data.sampler = "uniform"
    config.data.batch_size = 4
    config.data.canvas = (256, 256)  # the tiles are of 128: small objects are seen larger
    config.data.scale_jitter = (0.8, 1.2)
    config.data.max_boxes = 40
    config.data.mask_size = 56
    config.model.backbone = "efficientnet_lite0"
    config.model.dtype = "float32"
    config.model.fpn_channels = 64
    config.model.anchors.scales = (4.0,)
    config.model.rpn.loss.num_samples = 128
    config.model.rpn.train_proposals = dict(pre_nms=500, post_nms=200, nms_iou=0.7)
    config.model.rpn.test_proposals = dict(pre_nms=500, post_nms=200, nms_iou=0.7)
    config.model.box_head.width = 256
    config.model.box_head.sample.num_samples = 64
    config.model.mask_head.update(kind="class_agnostic", width=64, num_convs=2)
    config.model.detections.update(max_candidates=512, max_detections=60)
    config.optimizer.learning_rate_per_image = 0.004
    config.optimizer.warmup_steps = 30
    config.optimizer.num_steps = steps
    config.optimizer.decay = "cosine"
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 50
    config.checkpoint.keep_epochs = False
    config.evaluation.update(batch_size=4, metric="coco_masks")
    config.log.every_steps = 10
    return config
