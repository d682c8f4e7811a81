"""The baseline on 512 accelerators with weak supervision by photos with image-level labels alone.

    python -m scripts.make_half_labelled --dataset=DIR --share=1 --output=LABELLED
    python -m detection.train --config=configs/detection/pod512_weak.py --config.data.dir=LABELLED
        --config.init_from=DETECTOR --workdir=gs://BUCKET/RUN

Hardware: 512 devices with 2 images each, such as a v3-512; scripts/launch_pod.sh starts the run.
Schedule: starts from a trained detector. Of five steps four are of labels, on a smaller canvas, as
          Detic (Zhou et al. 2022) found best; an epoch is one of the photos with boxes.
Paper:    section 5.7 gives no figures and no constants of its weakly supervised training: the head
          and the way boxes are mined are readings, see docs/guides/weak.md.

Not measured: no run of this size has been made. scripts.plan_pod compiles both programs
(--labels_only for the other one).
"""

import ml_collections

from configs.detection import base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs of the photos with boxes, "13" (default) or "26"."""
    config = base.get_config(arg)
    config.name = "pod512_weak"
    config.data.sources = (dict(split="boxes"), dict(split="labels", annotations="labels"))
    config.data.label_steps = dict(share=0.8, canvas=(480, 800))
    config.data.image_labels = True
    config.data.sampler = "full_class_batch"
    config.data.batch_size = 1024
    config.model.norm = "sync"
    config.model.fpn_norm = "sync"
    config.model.weak.kind = "wsddn"
    config.model.weak.refinements = 3
    # Of 8,515 steps an epoch, a fifth of them with boxes: from the end of the warm-up on, in which
    # nothing good is mined, and with full weight an epoch later.
    config.model.weak.mining.refine = True
    config.model.weak.mining.start_steps = 17_030
    config.model.weak.mining.ramp_steps = 8_515
    config.model.loss_weights.weak = 0.1
    config.model.loss_weights.weak_refinement = 0.1
    config.model.loss_weights.mined = 0.1
    config.optimizer.warmup_epochs = 2.0
    config.checkpoint.every_steps = 0  # besides the ends of epochs
    config.evaluation.batch_size = 1024
    return config
