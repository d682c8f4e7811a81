"""Every field of a segmenter's run, and the three crop sizes of the paper's table 5.

A run's own file takes this and changes what it names. The values are HRNet-W48's.
"""

import ml_collections

CROPS: dict[str, dict] = {
    "112": dict(short=None, long=None, fixed=(112, 112)),
    "200_300": dict(short=(200, 300), long=600, fixed=None),
    "256": dict(short=(256, 256), long=600, fixed=None),
}
TEST_CROPS: dict[str, dict] = {
    "112": CROPS["112"],
    "200_300": dict(short=250, long=550, fixed=None),
    "256": dict(short=256, long=600, fixed=None),
}
CANVASES = {  # height, width
    "112": ((112, 112),),
    "200_300": ((320, 320), (320, 448), (448, 320), (448, 448), (320, 608), (608, 320)),
    "256": ((288, 288), (256, 384), (384, 256), (384, 384), (256, 608), (608, 256)),
}
TEST_CANVASES = {
    "112": ((112, 112),),
    "200_300": ((256, 256), (256, 384), (384, 256), (256, 576), (576, 256)),
    "256": ((288, 288), (256, 384), (384, 256), (256, 608), (608, 256)),
}


def get_config(crops: str = "256", arg: str | None = None) -> ml_collections.ConfigDict:
    """`crops`: one of CROPS; `arg`: "" or "flip", which averages with the mirrored crop."""
    if arg not in (None, "", "flip"):
        raise ValueError(f"config argument {arg!r}, expected flip")
    config = ml_collections.ConfigDict()
    config.task = "segmentation"
    config.name = "base"
    config.seed = 0

    config.data = dict(
        dir="",  # dataset directory with masks, written by scripts.prepare_data
        train_split="train",
        eval_split="validation",
        sampler="uniform",  # uniform | class_aware, over the boxes that have masks
        max_instances=0,  # of them, the same random ones throughout a run; 0: all
        batch_size=64,  # crops of all devices together
        crop=CROPS[crops],  # range of the short side and limit of the long one, or a fixed size
        # A batch takes the smallest canvas that holds its crops; what none holds shrinks.
        canvases=CANVASES[crops],
        group_steps=16,  # steps whose crops are sorted by aspect into batches
        jitter=0.1,  # each side of a box moves by up to this share of its length
        rotate=True,  # more for classes of long boxes, as in detection
        flip=True,
        proposals="",  # detections table: its boxes that match a ground-truth box are cut as well
        proposal_share=0.5,  # of the crops, where there are proposals
        on_image_error="fatal",  # fatal | skip
        num_processes=0,  # that load photos; 0: one for every 4 cores, 1: threads of the run alone
        num_threads=0,  # of all of these; 0: twice the cores
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
        layout=None,  # of a smaller variant: dict(width=4, modules=(1, 0, 0), blocks=1)
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
        accumulate=1,  # parts of a device's images, one after another; not with norm sync
        reduce_dtype="float32",  # float32 | bfloat16, in which devices sum their gradients
    )

    config.checkpoint = dict(every_steps=2000, keep_last=2, keep_epochs=False)
    config.evaluation = dict(batch_size=64, every_steps=0)  # 0: at the end, -1: never
    config.test = dict(  # of segmentation.evaluate and segmentation.export
        **TEST_CROPS[crops],
        canvases=TEST_CANVASES[crops],
        flip=arg == "flip",  # average with the mirrored crop
        vote="mean",  # mean | hard: of several voters, see common.masks.vote
        threshold=0.5,  # that the foreground's probability must exceed
    )
    config.log = dict(
        every_steps=50,
        stall_seconds=1800,  # without a step until stacks are printed; 0: never
        abort_after_stalls=2,  # so many times stall_seconds end the run; 0: never
        profile_steps=(),  # (first, last) step to trace into WORKDIR/profile; so does SIGUSR1
    )
    return config
