"""Naive ensemble: the boxes of all models in one list, NMS in each class.

    python -m ensemble.merge --config=configs/ensemble/naive.py --inputs=a.parquet,b.parquet
        --output=m.parquet

Paper: 61.917 with models 1 to 16 (table 4), single models 58.6 to 60.5; 57.994 with four (table 3).
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: another operator, such as "wbf" (with its own defaults); default "nms"."""
    config = ml_collections.ConfigDict()
    config.name = "naive"
    config.dataset = ""  # dataset directory: order of the classes, hierarchy; not needed otherwise
    config.coverage = "same"  # same | union | intersection: when tables cover different images
    config.mappings = ""  # name=coco_to_openimages,...: tables of another vocabulary
    config.experts = ""  # name=file,...: models that contribute only the classes listed there
    config.masks = False  # keep the masks
    config.mask_match = "boxes"  # boxes | masks (nms alone): what overlaps
    config.mask_rule = "best"  # best | mean: of merged rows, that of the best box or of all
    config.min_score = 0.0  # weighted scores below are dropped before the operator

    config.calibration = ""  # JSON file of ensemble.calibrate: scores become precisions
    config.opinion = True  # with the calibration's second opinion, if it has one

    config.weights = dict(
        metrics="",  # JSON with AP per class, one file a table in the order of the inputs
        normalize="max",  # max | sum | none: what AP is divided by
        exponent=1.0,
        floor=0.0,
        models="",  # name=weight,...
    )

    # Any operator of ensemble.operators with its fields.
    config.operator = ml_collections.ConfigDict({"name": arg or "nms"})
    if arg is None:
        config.operator.iou_threshold = 0.5
    config.tree = ""  # JSON file of ensemble.search; takes the place of the operator

    config.expansion = "none"  # none | before | after the operator: copy to parent classes
    config.relations = dict(
        file="",  # of scripts.mine_relations
        cooccurrence="top",  # top | scale | off
        surround=True,
        denominator="j",  # P(i|j) = N(i and j) / N(j); "i": N(i), as the paper prints it
        tau_p=0.8,  # least P(i|j) of a pair
        tau_s=0.5,  # least score of the class that speaks for another
        tau_i=0.1,  # least score of the class that is spoken for
        tau_q=0.9,  # least share of boxes of a class inside boxes of another
        inside=0.9,  # share of its area from which a box is inside another
        gain=0.1,  # factor 1 + gain where the partner is found
        loss=0.1,  # factor 1 - loss where it is missing
        min_images=10,  # that a pair was counted in
        min_boxes=10,
    )
    config.rescoring = dict(
        groups="",  # LVIS JSON, {label: r|c|f} JSON or dataset directory
        mode="multiplier",  # multiplier | exponent
        rare=1.0,
        common=1.0,
        frequent=1.0,
    )
    config.max_detections = 300  # of an image; 0: all
    config.chunk_rows = 1 << 19  # rows of all tables in memory at once, about
    return config
