"""EfficientNet-Lite0 with masks on a small long-tailed set: losses and samplers compared on a CPU.

    python -m scripts.make_long_tail --train=instances_train.json --validation=instances_val_a.json
        --output=tail --rare=3 --common=9
    python -m scripts.prepare_data lvis --source='tail/lvis_*.json' --images=photos
        --ignore=tail/ignore.json --output=DIR
    python -m scripts.bench.ablate_detection --config=configs/detection/long_tail_lite0.py
        --variants=ce,eql,rfs,eql_rfs --metric=AP,APr,APc,APf --config.data.dir=DIR
        --config.model.pretrained=lite0.safetensors --workdir=WORK

For some 500 training photos: a class on fewer than 1.8 % of them (9 photos) is suppressed by the
equalization loss, and repeated photos have a class on fewer than 3 %. Masks are class-agnostic,
since rare classes have one to three photos.

Hardware: two CPU cores.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    del arg
    config = base.get_config()
    config.name = "long_tail_lite0"
    config.data.sampler = "uniform"
    config.data.repeat_threshold = 0.03
    config.data.eval_split = "val_a"
    config.data.batch_size = 8
    config.data.canvas = (256, 256)
    config.data.max_boxes = 40
    config.data.scale_jitter = (0.8, 1.0)
    config.data.mask_size = 56
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
    config.model.box_head.classifier.eql.threshold = 0.018
    config.model.mask_head.kind = "class_agnostic"
    config.model.mask_head.width = 64
    config.model.mask_head.num_convs = 2
    config.model.detections.score_threshold = 1e-4
    config.optimizer.learning_rate_per_image = 0.0008
    config.optimizer.warmup_steps = 150
    config.optimizer.num_epochs = 12.0
    config.optimizer.decay_epochs = (9.0, 11.0)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_epochs = False
    config.evaluation.batch_size = 8
    config.evaluation.metric = "lvis_masks"
    config.log.every_steps = 20
    return config
