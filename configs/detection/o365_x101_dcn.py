"""Faster R-CNN, deformable ResNeXt-101 64x4d with FPN, Objects365.

    python -m detection.train --config=configs/detection/o365_x101_dcn.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK
    python -m detection.export --workdir=WORK --config.data.dir=OPENIMAGES --split=validation
        --other_classes --output=theirs.parquet
    python -m scripts.map_detections --detections=theirs.parquet --mapping=objects365_to_openimages
        --output=expert.parquet

An expert for the classes that Objects365 shares with OpenImages. DIR is written by
`scripts.prepare_data objects365`; docs/guides/sampling.md has the whole chain.

Hardware: any number N of accelerators with 2 images each (--config.data.batch_size=2N; 64 here).
Schedule: 13 epochs; another number of epochs after a colon, such as `o365_x101_dcn.py:26`.
Paper:    8 experts on Objects365 (section 7), of which it tells no more; with those on COCO they
          bring the ensemble from 67.2 to 68.0 on the public leaderboard.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" by default."""
    config = base.get_config(arg)
    config.name = "o365_x101_dcn"
    config.data.eval_split = "val"
    config.model.backbone = "resnext101_64x4d"
    config.model.deform = (1, 1, 1)
    config.model.remat = True
    config.evaluation.metric = "coco"
    return config
