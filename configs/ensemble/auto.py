"""Auto ensemble: a searched binary tree over detectors (section 4.2 of the paper).

    python -m ensemble.search --config=configs/ensemble/auto.py --inputs=a.parquet,b.parquet,...
        --dataset=DIR --split=val_a --report_split=val_b --output=tree.json
    python -m ensemble.merge --config=configs/ensemble/auto.py --config.tree=tree.json
        --inputs=a_test.parquet,b_test.parquet,... --output=m.parquet

`:joint` after the file name searches tree and operators in one stage, which the paper announces,
instead of its two stages. Tables are given in the same order both times. Expand them to parent
classes first (scripts.expand_detections) where the metric asks for it. Trees may leave models out;
with `--config.calibration=cal.json` (ensemble.calibrate) they join calibrated scores.

Paper: +2.9 and +3.6, +1.2 and +1.0 mAP on its two validation sets, +0.9 on the public leaderboard,
over the naive ensemble. Hardware: two CPU cores; 2000 trees over 11 tables of 4000 images within
an hour.
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "two_stage" (default) or "joint"."""
    config = naive.get_config()
    config.name = "auto"
    config.max_detections = 0  # of an image; 0: all, as the search counts them

    # joint: one stage over trees and operators; topology, operators: the paper's two stages
    stages = {
        "two_stage": dict(topology=600, operators=1400, joint=0),
        "joint": dict(topology=0, operators=0, joint=2000),
    }
    config.search = dict(
        trees=stages[arg or "two_stage"],  # trees to score in each stage
        seed=0,
        population=16,
        tournament=3,
        # "Equal contribution for each child node": all nodes of the topology stage, new nodes of
        # the joint one. Scores as in eq. 8 and boxes as in eq. 9 with one vote.
        equal=dict(vote=0.5, box=0.3, nms="adj"),
        space=dict(
            weights=(0.2, 0.35, 0.5, 0.7, 0.85, 1.0),  # of the weaker child, the other has 1
            votes=(0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0),
            boxes=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
            nms=("nms", "soft", "adj"),
            elements=("both", "scores", "boxes"),
        ),
        iou_threshold=0.5,  # above it two boxes are one object
        sigma=0.5,  # of the decay in "soft" and "adj"
        min_score=0.001,  # "soft" drops rows below
        naive=dict(name="voting"),  # the ensemble to compare with
        # Empty thresholds: 0.5 for openimages; 0.5, 0.7, 0.9 for coco and lvis.
        metric=dict(iou_thresholds=(), group_of_weight=1.0, image_labels=True),
        folds=5,  # of the tuned split, on which the tree must reach the best model alone
        threads=2,
        cache_gigabytes=2.0,  # for joined subtrees
        save_seconds=30.0,  # a killed search loses at most so much
        log_seconds=20.0,
    )
    return config
