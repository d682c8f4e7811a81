"""ImageNet pre-training of a backbone: the standard recipe of 90 epochs.

    python -m detection.pretrain --config=configs/pretrain/resnet50.py --config.data.dir=DIR
        --workdir=WORK
    python -m detection.pretrain --config=configs/pretrain/resnet50.py:senet154
        --config.data.tfds=imagenet2012 --workdir=WORK

DIR holds train/CLASS/*.jpg and validation/CLASS/*.jpg. With --config.data.dataset instead, a
directory of scripts.prepare_data, each class is learnt on the photos on which it was verified.
Hardware: any number of accelerators; the learning rate is written per image (0.1 for 256) and
          follows the batch size.
Expected: top-1 of 76 to 77 % with ResNet-50 (literature: 76.1 torchvision V1, 77.2 with smoothed
          labels and a cosine).
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: the backbone, "resnet50" (default) or another of `common.nn.backbones`."""
    config = ml_collections.ConfigDict()
    config.task = "classification"
    config.name = f"pretrain_{arg or 'resnet50'}"
    config.seed = 0

    config.data = dict(
        dir="",  # folder with SPLIT/CLASS/PHOTO; with `tfds`: the folder of TFDS
        tfds="",  # name in TensorFlow Datasets, prepared as array_record
        dataset="",  # or a dataset directory, of whose photos verified image-level labels are known
        sampler="uniform",  # uniform | class_aware
        train_split="train",
        eval_split="validation",
        batch_size=1024,  # images of all devices together
        image_size=224,
        crop_area=(0.08, 1.0),  # share of the photo in a random crop
        crop_aspect=(3 / 4, 4 / 3),
        flip=True,
        eval_crop=0.875,  # of the short side
        num_processes=0,  # that load photos; 0: one for every 4 cores, 1: threads of the run alone
        num_threads=0,  # of all of these; 0: twice the cores
        prefetch=2,  # batches
    )

    config.model = dict(
        backbone=arg or "resnet50",
        norm="sync",  # batch (per device) | sync | group
        remat=False,  # recompute backbone activations in the backward pass
        drop_path_rate=0.0,  # stochastic depth (EfficientNet, NASNet)
        dropout_rate=0.0,
        label_smoothing=0.1,
        dtype="bfloat16",  # of convolutions; parameters, head and loss are float32
    )

    config.optimizer = dict(
        learning_rate=0.0,  # whatever the batch size; one of these two rates is above 0
        learning_rate_per_image=0.1 / 256,
        warmup_start=0.0,
        warmup_epochs=5.0,
        warmup_steps=0,  # when positive, instead of warmup_epochs
        num_epochs=90.0,
        num_steps=0,  # when positive, instead of num_epochs
        decay="cosine",  # step | cosine | poly
        decay_epochs=(30, 60, 80),  # of step
        decay_factor=0.1,
        power=0.9,  # of poly
        momentum=0.9,
        weight_decay=1e-4,
        clip_norm=0.0,  # 0: off
        accumulate=1,  # parts of a device's images, one after another; not with norm sync
        reduce_dtype="float32",  # float32 | bfloat16, in which devices sum their gradients
    )

    config.checkpoint = dict(every_steps=2000, keep_last=2, keep_epochs=False)
    config.evaluation = dict(batch_size=256, every_epochs=5)  # 0: only at the end
    config.log = dict(
        every_steps=50,
        stall_seconds=1800,  # without a step until stacks are printed; 0: never
        abort_after_stalls=2,  # so many times stall_seconds end the run; 0: never
        profile_steps=(),  # (first, last) step to trace into WORKDIR/profile; so does SIGUSR1
    )
    return config
