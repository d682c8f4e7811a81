"""Every field of a detector's run, with the values of the paper's baseline.

The other files of this folder are this one and a flat list of changes; `detection.settings` reads
and checks the fields. Alone it is the run of r50.py.
"""

import ml_collections

EIGHTEEN_ANCHORS = dict(  # section 5.5; `config.model.anchors` of the models of tables 2 to 4
    scales=(8.0, 11.0, 14.0), ratios=(0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
)
ONE_STAGE = dict(  # one entry a stage; several make a cascade
    iou=(0.5,),
    stds=((0.1, 0.1, 0.2, 0.2),),
    loss_weights=(1.0,),
    score_weights=(1.0,),
    average="probability",  # probability | logit
    box_stage=-1,  # whose boxes are the result
)
THREE_STAGES = dict(  # the standard cascade
    iou=(0.5, 0.6, 0.7),
    stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
    loss_weights=(1.0, 0.5, 0.25),
    score_weights=(1.0, 1.0, 1.0),
    average="probability",
    box_stage=-1,
)
FOUR_STAGES = dict(  # section 5.6; its one list of weights serves losses and scores
    iou=(0.5, 0.5, 0.6, 0.7),
    stds=(
        (0.1, 0.1, 0.2, 0.2),
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    ),
    loss_weights=(0.75, 1.0, 0.25, 0.25),
    score_weights=(0.75, 1.0, 0.25, 0.25),
    average="probability",
    box_stage=-1,
)


ELABORATE_OFF = dict(  # section 5.3, `config.data.elaborate`, see common.data.augmentation
    scale="none",  # none | crop | resize: a window around a box of the class drawn
    rotate=False,  # classes of long boxes more
    boxes="hull",  # hull | ellipse: what becomes of a turned box
    max_zoom=4.0,  # of a box, against the whole photo fitted into the canvas
)
ELABORATE = {**ELABORATE_OFF, "scale": "crop", "rotate": True}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of epochs, "13" (default) or "26"."""
    epochs = int(arg or 13)
    decay = {12: (8, 11), 13: (9, 11), 26: (18, 22)}.get(
        epochs, (round(0.7 * epochs), round(0.85 * epochs))
    )
    config = ml_collections.ConfigDict()
    config.task = "detection"
    config.name = "r50"
    config.seed = 0
    config.init_from = ""  # work directory or file of a trained detector, of any classes

    config.data = dict(
        dir="",  # dataset directory written by scripts.prepare_data
        train_split="train",
        eval_split="validation",
        sources=(),  # several datasets: common.data.settings.SourceSettings; (): train_split of dir
        label_steps=dict(  # for sources with annotations="labels"
            share=0.0,  # of the steps, which have only such photos; 0: mixed into all batches
            canvas=(),  # short and long side of these steps; (): canvas and scales of the run
        ),
        # uniform | class_aware | full_class_batch | expert | repeat_factor
        sampler="class_aware",
        positive_share=0.25,  # sampler expert: of images with boxes, the rest has none
        repeat_threshold=0.001,  # sampler repeat_factor: share of the photos of a class, below rare
        pools="",  # samplers by class: file of classes drawn from each other's photos; openimages
        batch_size=64,  # images of all devices together
        canvas=(800, 1333),  # short and long side of landscape and portrait photos
        scales=(),  # multi-scale training: short sides, one a step, such as (640, 672, ..., 800)
        pad_multiple=32,
        max_boxes=100,  # ground-truth boxes of a photo, a random subset; the others are ignored
        max_ignore=32,  # regions of a photo in which nothing is background
        flip=True,
        scale_jitter=(1.0, 1.0),  # times the fitted size; what then exceeds the canvas is cut off
        elaborate=ELABORATE_OFF,
        group_of="ordinary",  # ordinary | ignore | drop: what a group-of box is in training
        mask_size=0,  # pixels of the side of an object's mask in batches, such as 112; 0: none
        image_labels=False,  # batches say which classes were verified as present or absent
        proposals="",  # of a refiner: detections table of the training photos
        max_proposals=0,  # of a refiner: boxes of a photo at a time; training takes the best
        on_image_error="fatal",  # fatal | skip
        num_processes=0,  # that load photos; 0: one for every 4 cores, 1: threads of the run alone
        num_threads=0,  # of all of these; 0: twice the cores
        prefetch=2,  # batches
    )

    config.model = dict(
        backbone="resnet50",
        pretrained="",  # file written by scripts.convert_weights; empty: random weights
        pixel_mean=(),  # of red, green and blue, 0..255; (): what the backbone's weights expect
        pixel_std=(),
        norm="frozen",  # frozen | batch (per device) | sync | group
        frozen_stages=1,  # the stem and this many stages are not trained
        deform=(0, 0, 0),  # version of the deformable convolutions in c3, c4, c5; 0: ordinary ones
        split_after="",  # c2 | c3: two branches from there, one for classes and one for boxes
        low_weight=0.25,  # of box losses in the class branch and of class losses in the box branch
        drop_path_rate=0.0,  # stochastic depth of the last block (EfficientNet)
        remat=False,  # recompute backbone activations in the backward pass
        dtype="bfloat16",  # of matmuls and convolutions; parameters and losses are float32
        neck="fpn",  # fpn | nas_fpn
        fpn_channels=256,
        # none | batch | sync | group: for backbones with large taps; frozen: of converted detectors
        fpn_norm="none",
        nas_fpn=dict(repeats=7, min_level=3, norm="sync"),
        anchors=dict(
            scales=(8.0,),  # in strides
            ratios=(0.5, 1.0, 2.0),
            ratio_convention="h/w",  # what `ratios` are
            centre=0.5,  # of a cell; 0 puts anchors on cell corners
            rounded=False,  # sides on whole pixels; with centre=0 torchvision's anchors
            # of cells: stride | canvas (sides of the canvas over cells, rounded down: torchvision)
            spacing="stride",
        ),
        ignore_ioa=0.5,  # of a box inside an ignore region; above, it is never background
        rpn=dict(
            num_convs=1,  # of 3x3, shared by logits and deltas
            loss=dict(
                positive_iou=0.7,
                negative_iou=0.3,
                best_match_iou=0.3,
                num_samples=256,
                positive_fraction=0.5,
                beta=1.0 / 9.0,
            ),
            train_proposals=dict(pre_nms=2000, post_nms=2000, nms_iou=0.7),
            test_proposals=dict(pre_nms=1000, post_nms=1000, nms_iou=0.7),
        ),
        box_head=dict(
            kind="two_fc",  # two_fc | decoupling | regressor (no classes: refines a table's boxes)
            convs=dict(count=0, width=256, norm="none"),  # of two_fc, before its dense layers
            num_fcs=2,  # of two_fc: dense layers
            width=1024,
            class_agnostic=False,  # one box a region instead of one a class
            pool_size=7,
            aligned=True,  # half-pixel RoIAlign
            sampling_ratio=2,  # samples a bin and axis; 0: one a cell, as detectron2 (slow on CPU)
            sample_mode="centre",  # centre | edge (as the authors' code: 4 samples an axis)
            classifier=dict(  # see detection.classifiers
                # softmax | softmax_eql | sigmoid | eql | federated | eqlv2 | seesaw
                kind="softmax",
                prior=0.001,  # of sigmoids: probability that each starts with
                # Of sigmoid, eql and federated: an object is one of the ancestors of its class too,
                # and says nothing of the descendants. Needs class_agnostic boxes.
                hierarchy=False,
                eql=dict(  # of eql and softmax_eql
                    threshold=0.00177,  # share of the annotated photos below which a class is rare
                    gamma=0.95,  # of softmax_eql: chance that a rare class is left out of a softmax
                ),
                federated=dict(
                    num_classes=50,  # that have a loss in a step, the annotated ones among them
                    power=0.5,  # of the number of photos of a class: its chance to be drawn
                ),
                eqlv2=dict(gamma=12.0, mu=0.8, alpha=4.0),
                seesaw=dict(p=0.8, q=2.0, floor=0.01),  # floor: of a probability that divides
            ),
            offsets=dict(  # of the Decoupling Head
                offset_width=256,
                gamma=0.1,  # unit of the shifts, in region sizes
                offset_init="small",  # small | zero | release
            ),
            sample=dict(num_samples=512, positive_fraction=0.25),
            loss=dict(
                beta=1.0,
                normaliser="sampled",  # sampled | positive
                target_gradient=False,  # box loss moves the shift through its target too
            ),
            margin=dict(class_margin=0.2, box_margin=0.2, clip=True),
        ),
        mask_head=dict(
            kind="none",  # none | class_specific | class_agnostic; needs data.mask_size
            pool_size=14,  # half the side of a mask
            width=256,
            num_convs=4,
            norm="none",  # none | frozen, after each convolution: of converted detectors
            stages="last",  # last | all: of a cascade, whose regions train a mask head
        ),
        truth_jitter=dict(  # of a refiner
            copies=0,  # moved copies of each ground-truth box beside the table's boxes
            shift=0.1,  # standard deviations: of the centre, in sides of the box
            scale=0.2,  # of the logarithm of each side's factor
        ),
        weak=dict(  # weakly supervised head (section 5.7): docs/guides/weak.md
            kind="none",  # none | wsddn; needs data.image_labels
            class_stream="softmax",  # softmax | sigmoid: of the classes of a proposal
            width=1024,
            num_proposals=512,  # of an image, the best
            refinements=0,  # classifiers that learn from the scores of the one before (OICR)
            feature_gradient=1.0,  # share of its gradient that the features it reads get: 0 to 1
            truth_seeds=True,  # where there are boxes, refinements learn from these instead
            mining=dict(  # boxes of label steps, which the box heads learn from
                rule="top1",  # top1 | mist: the best proposal of a class, or several
                threshold=0.3,  # of the score
                top_share=0.15,  # of mist: proposals of a class that are looked at
                seed_iou=0.2,  # of mist: boxes of a class overlap less
                max_boxes=16,  # of an image
                refine=False,  # boxes are moved by the box heads first
                background_iou=0.1,  # background overlaps a mined box by this to 0.5
                start_steps=0,  # of both kinds before the box heads learn from mined boxes
                ramp_steps=0,  # until their losses have full weight
            ),
        ),
        stages=ONE_STAGE,
        loss_weights=dict(
            rpn_class=1.0,
            rpn_box=1.0,
            box_class=1.0,
            box_regression=1.0,
            sibling_box_class=1.0,
            sibling_box_regression=1.0,
            margin_class=1.0,
            margin_box=1.0,
            mask=1.0,
            weak=1.0,
            weak_refinement=1.0,
            mined=1.0,  # times the others, of what box heads learn from mined boxes
        ),
        drop_background_rois=False,  # experts: no detection where background scores highest
        detections=dict(
            score_threshold=0.001, iou_threshold=0.5, max_candidates=4096, max_detections=300
        ),
    )

    config.optimizer = dict(
        learning_rate=0.0,  # whatever the batch size; one of these two rates is above 0
        learning_rate_per_image=0.002,  # 0.004 N for N accelerators with 2 images each
        warmup_start=0.001,
        warmup_epochs=1.0,
        warmup_steps=0,  # when positive, instead of warmup_epochs
        num_epochs=float(epochs),  # fractions are fine
        num_steps=0,  # when positive, instead of num_epochs
        decay="step",  # step | cosine | poly
        decay_epochs=decay,  # of step
        decay_factor=0.1,
        power=0.9,  # of poly
        momentum=0.9,
        weight_decay=1e-4,
        clip_norm=35.0,  # 0: off
        accumulate=1,  # parts of a device's images, one after another; not with norm sync
        reduce_dtype="float32",  # float32 | bfloat16, in which devices sum their gradients
    )

    config.checkpoint = dict(
        every_steps=2000,
        keep_last=2,
        keep_epochs=True,  # epoch ends stay on disk for scripts.average_checkpoints
    )
    config.evaluation = dict(
        batch_size=32,
        every_epochs=0,  # 0: only at the end, 1: after each epoch, -1: never
        metric="openimages",  # openimages | coco | lvis, or of masks: coco_masks and so on
        mask_threshold=0.5,  # probability that a pixel of a mask must exceed, in export too
        expand_predictions=True,  # copy detections to parent classes first (paper section 1)
        proposals="",  # of a refiner: table of the evaluation split to refine and score
        num_pictures=4,  # photos whose detections TensorBoard shows at each evaluation
    )
    config.test_time = dict(  # of detection.export and detection.evaluate, see detection.tta
        scales=(),  # short sides, such as (600, 800, 1000, 1333, 1666, 2000); (): one view
        long_ratios=(1.0, 1.34, 1.67),  # of canvases; longer photos are shrunk to the last one
        max_long=3333,
        flip=True,
        merge="union",  # union | tables | mean
    )
    config.log = dict(
        every_steps=50,
        stall_seconds=1800,  # without a step until stacks are printed; 0: never
        abort_after_stalls=2,  # so many times stall_seconds end the run; 0: never
        profile_steps=(),  # (first, last) step to trace into WORKDIR/profile; so does SIGUSR1
    )
    return config
