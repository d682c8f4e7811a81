"""The training of the paper's largest models: full-class batches and elaborate augmentation.

    python -m detection.train --config=configs/detection/pod512_elaborate.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=gs://BUCKET/RUN

Hardware: 512 devices with 2 images each, such as a v3-512; scripts/launch_pod.sh starts the run.
Schedule: that of pod512.py, of which `pod512_elaborate.py:26` is the long one.
Paper:    "For models trained with 512 accelerators, we design a 'full class batch' and a elaborate
          augmentation" (section 5.3); it gives no figure of either alone. Scale is read as that of
          a window cut out of the photo; `--config.data.elaborate.scale=resize` reads otherwise.

Not measured at this size. The classes of a batch: scripts.class_histogram; what it looks like:
scripts.draw_batches; what augmentation costs: docs/results.md.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "pod512_elaborate"
    config.data.sampler = "full_class_batch"
    config.data.batch_size = 1024
    config.data.elaborate = base.ELABORATE
    config.model.norm = "sync"
    config.model.fpn_norm = "sync"
    config.optimizer.warmup_epochs = 2.0
    config.checkpoint.every_steps = 0  # besides the ends of epochs
    config.evaluation.batch_size = 1024
    return config
