"""HRNet-W48 on boxes with the short side at 256: the best single model of the segmentation track.

    python -m segmentation.train --config=configs/segmentation/hrnet_w48_256.py
        --config.data.dir=DIR --workdir=WORK
    python -m segmentation.export --config=configs/segmentation/hrnet_w48_256.py:flip
        --config.data.dir=DIR --workdir=WORK --boxes=x.parquet --output=y.parquet

Hardware: any number N of accelerators with 8 crops each (--config.data.batch_size=8N; 64 here).
Schedule: 200,000 steps, learning rate 0.08 at any batch size, falling as (1 - step / steps)^0.9.
Paper:    public leaderboard 53.30; with mirrored crops in the test, `:flip`, 54.90 (table 5).
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "" (default) or "flip", which averages with the mirrored crop in the test."""
    if arg not in (None, "", "flip"):
        raise ValueError(f"config argument {arg!r}, expected flip")
    config = ml_collections.ConfigDict()
    config.task = "segmentation"
    config.name = "hrnet_w48_256"
    config.seed = 0

    config.data = dict(
        dir="",  # dataset directory with masks, written by scripts.prepare_data
        train_split="train",
        eval_split="validation",
        sampler="uniform",  # uniform | class_aware, over the boxes that have masks
        max_instances=0,  # of them, the same random ones throughout a run; 0: all
        batch_size=64,  # crops of all devices together
        crop=dict(
            short=(256, 256),  # range that the short side is drawn from; None with `fixed`
            long=600,  # longer crops are shrunk to it
            fixed=None,  # (height, width): whatever the box's aspect
        ),
        # Height, width. A batch takes the smallest that holds its crops; what none holds shrinks.
        canvases=((288, 288), (256, 384), (384, 256), (384, 384), (256, 608), (608, 256)),
        group_steps=16,  # steps whose crops are sorted by aspect into batches
        jitter=0.1,  # each side of a box moves by up to this share of its length
        rotate=True,  # more for classes of long boxes, as in detection
        flip=True,
        proposals="",  # detections table: its boxes that match a ground-truth box are cut as well
        proposal_share=0.5,  # of the crops, where there are proposals
        on_image_error="fatal",  # fatal | skip
        num_threads=0,  # of decoding; 0: twice the cores
        prefetch=2,  # batches
    )

    config.model = dict(
        backbone="hrnet_w48",  # or hrnet_w18, hrnet_w32, any of common/nn/backbones/__init__.py
        pretrained="",  # file written by scripts.convert_weights; empty: random weights
        class_specific=False,  # one pair of logits a class instead of one for all
        upsampling="bilinear",  # bilinear | nearest: in the exchange units
        norm="sync",  # sync | batch (per device) | group | frozen
        remat=False,  # recompute activations in the backward pass
        dtype="bfloat16",  # of matmuls and convolutions; parameters and losses are float32
    )

    config.optimizer = dict(
        learning_rate=0.08,  # whatever the number of crops, as in the paper
        learning_rate_per_image=0.0,  # linear scaling instead: 0.08 / 64, and learning_rate=0
        warmup_start=0.0,
        warmup_epochs=0.0,
        warmup_steps=0,
        num_epochs=0.0,
        num_steps=200_000,  # when 0, num_epochs instead
        decay="poly",  # step | cosine | poly
        decay_epochs=(),  # of step
        decay_factor=0.1,
        power=0.9,  # of poly
        momentum=0.9,
        weight_decay=5e-4,
        clip_norm=0.0,  # 0: off
    )

    config.checkpoint = dict(every_steps=2000, keep_last=2, keep_epochs=False)
    config.evaluation = dict(batch_size=64, every_steps=0)  # 0: only at the end
    config.test = dict(  # of segmentation.evaluate and segmentation.export
        short=256,
        long=600,
        fixed=None,
        canvases=((288, 288), (256, 384), (384, 256), (256, 608), (608, 256)),
        flip=arg == "flip",  # average with the mirrored crop
        vote="mean",  # mean | hard: of several voters, see segmentation.vote
        threshold=0.5,  # that the foreground's probability must exceed
    )
    config.log = dict(every_steps=50, stall_seconds=1800)
    return config
