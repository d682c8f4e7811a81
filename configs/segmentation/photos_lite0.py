"""EfficientNet-Lite0 as trunk: for some hundreds of photos with masks and two CPU cores.

    python -m segmentation.train --config=configs/segmentation/photos_lite0.py:112
        --config.data.dir=DIR --config.model.pretrained=lite0.safetensors --workdir=WORK

`:112`, `:256` and `:200_300` are the crop sizes of the paper's table 5, `:256_flip` the test of 256
with mirrored crops; a number behind a comma is that of the steps, as in `:112,400` (default 600).
ImageNet weights are those that the quick start converts. docs/results.md has time and figures
as measured.
"""

import ml_collections

from configs.segmentation import base

BATCH_SIZES = {  # of training and evaluation
    "112": (32, 32),
    "200_300": (12, 8),
    "256": (16, 8),
    "256_flip": (16, 8),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: crop size, and after a comma the number of steps; default "112,600"."""
    size, _, steps = (arg or "112").partition(",")
    if size not in BATCH_SIZES:
        raise ValueError(f"config argument {size!r}, expected one of {', '.join(BATCH_SIZES)}")
    config = base.get_config(size.removesuffix("_flip"), "flip" if "flip" in size else None)
    config.name = f"photos_lite0_{size}"
    config.data.batch_size, config.evaluation.batch_size = BATCH_SIZES[size]
    config.model.backbone = "efficientnet_lite0"
    config.model.dtype = "float32"
    config.optimizer.update(learning_rate=0.0, learning_rate_per_image=0.02 / 32)
    config.optimizer.warmup_steps = 50
    config.optimizer.num_steps = int(steps or 600)
    config.optimizer.clip_norm = 5.0
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    return config
