"""EfficientNet-Lite0 on a half-labelled set: boxes of some photos, image-level labels of others.

    python -m scripts.make_half_labelled --dataset=DIR --output=HALF
    python -m detection.train --config=configs/detection/weak_lite0.py --config.data.dir=HALF
        --config.model.pretrained=lite0.safetensors --workdir=WORK
    python -m scripts.bench.ablate_detection --config=configs/detection/weak_lite0.py
        --variants=half,half_weak,all --config.data.dir=HALF
        --config.model.pretrained=lite0.safetensors --workdir=WORK

Every second step is of photos with labels alone; an epoch is one of the photos with boxes. The
refinements learn from boxes where there are any, and the box heads from what is mined once most of
the first third of the run is over. For some 600 photos of each kind.

Hardware: two CPU cores.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    del arg
    config = base.get_config()
    config.name = "weak_lite0"
    config.data.sources = (dict(split="boxes"), dict(split="labels", annotations="labels"))
    config.data.label_steps.share = 0.5
    config.data.image_labels = True
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
    config.model.weak.kind = "wsddn"
    config.model.weak.width = 256
    config.model.weak.num_proposals = 100
    config.model.weak.feature_gradient = 0.0  # features learn from boxes, true and mined
    config.model.weak.refinements = 3
    config.model.weak.mining.refine = True
    config.model.weak.mining.start_steps = 500
    config.model.weak.mining.ramp_steps = 200
    config.optimizer.learning_rate_per_image = 0.0008
    config.optimizer.warmup_steps = 150
    config.optimizer.num_epochs = 12.0
    config.optimizer.decay_epochs = (10.0, 11.4)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_epochs = False
    config.evaluation.batch_size = 8
    config.log.every_steps = 20
    return config
