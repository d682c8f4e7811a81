"""The run of lvis_x101.py with OpenImages photos of the shared classes beside those of LVIS.

    python -m detection.train --config=configs/detection/lvis_x101_openimages.py:OPENIMAGES
        --config.data.dir=DIR --config.init_from=COCO_RUN --workdir=WORK

OPENIMAGES is a dataset directory of OpenImages V5 (`scripts.prepare_data openimages --boxes=v5`).
Its boxes of classes that the shipped map knows teach boxes and classes, no masks; of the other
classes of LVIS nothing is known on its photos. The run lists the classes at its start. The map has
270, whose names or synsets are equal; the paper borrowed some 20,000 photos of 110, which it does
not list. As many photos with such boxes are taken here; an epoch is all photos of both.

Hardware: TPU slice or GPUs with 2 images a device (--config.data.batch_size=2N for N devices).
Time:     some 6.0 h on a v3-32, an estimate: 5.4 TFLOP a photo at a quarter of its peak;
          `scripts.plan_pod --nocompile --slice=v3-32 --num_classes=1230 --photos=76740` says more.
Paper:    with SENet-154 (--config.model.backbone=senet154) mask AP 31.4, rare 21.5, common 33.1,
          frequent 33.3 on v0.5 validation (table 1, its third row).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: dataset directory of OpenImages, "openimages" by default."""
    config = base.get_config()
    config.name = "lvis_x101_openimages"
    config.data.sources = (
        dict(dir="", share=57.0, annotations="boxes_masks"),
        dict(
            dir=arg or "openimages",
            share=20.0,
            class_map="openimages_to_lvis",
            others="unknown",
            max_images=20_000,
        ),
    )
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
