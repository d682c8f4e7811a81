"""The baseline on 512 accelerators: 1,024 images a step, each of which holds every class.

    python -m detection.train --config=configs/detection/pod512.py --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=gs://BUCKET/RUN

Hardware: 512 devices with 2 images each, such as a v3-512; scripts/launch_pod.sh starts the run.
Schedule: 13 epochs of 1,703 steps (1,743,042 photos), learning rate 0.001 -> 2.048 (0.004 N) over
          two epochs, x 0.1 at epochs 9 and 11; `pod512.py:26` is the long one.
Paper:    "For models trained with 512 accelerators, we design a 'full class batch'" (section 5.3);
          the paper gives no figure of such a model alone.

Not measured: no run of this size has been made, so neither its mAP nor that the rate of 2.048 is
stable is known. Chosen for stability, against the baseline of r50.py: batch norms that average over
all devices instead of frozen ones, in the pyramid as well, and a warm-up twice as long; gradients
are clipped at 35 in both. Tested: that every batch of the sampler holds every class
(tests/common/data/test_plan.py). Derived: an epoch is 5 to 6 minutes at a quarter of a v3-512's
peak (r50.py), so the checkpoint at each epoch's end is all that is saved.
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "pod512"
    config.data.sampler = "full_class_batch"
    config.data.batch_size = 1024
    config.model.norm = "sync"
    config.model.fpn_norm = "sync"
    config.optimizer.warmup_epochs = 2.0
    config.checkpoint.every_steps = 0  # besides the ends of epochs
    config.evaluation.batch_size = 1024
    return config
