"""What each wrong detection is: duplicate, wrong class, wrong place, both, or background.

Matching is that of the OpenImages metric, over ground truth expanded to parent classes. Each
evaluated detection that the metric counts as wrong gets the first kind that fits:

    duplicate     IoU >= 0.5 with an object of its class that a better-scored detection took
    class         IoU >= 0.5 with an object of another class
    localisation  0.1 <= IoU < 0.5 with an object of its class
    both          0.1 <= IoU < 0.5 with an object of another class
    background    anything else

as in TIDE (Bolya et al., ECCV 2020), with two deliberate differences. TIDE looks for localisation
first and for duplicates last; here the larger overlap decides, since in OpenImages two classes
often share an object. And an object carries all parent classes of its annotation, so that Animal on
a Dog is right and never a confusion. Group-of boxes are no target of any error.

Shape legend: e evaluated detections of a chunk, n detections of a chunk, m truth boxes (expanded).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from common.metrics import openimages
from common.metrics.openimages import Matches, Truth

IOU, MIN_IOU = 0.5, 0.1  # a hit; what TIDE calls background below

CORRECT, DUPLICATE, CLASS, LOCALISATION, BOTH, BACKGROUND, ABSORBED, UNVERIFIED = range(8)
STATUS_NAMES = (
    "correct", "duplicate", "class", "localisation", "both", "background", "absorbed", "unverified",
)  # fmt: skip
ERRORS = (CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND)  # in TIDE's order


class Outcomes(NamedTuple):
    """Of the evaluated detections of a chunk, in the order of `matches`."""

    matches: Matches
    status: Int[np.ndarray, " e"]
    target: Int[np.ndarray, " e"]  # row of the truth that the detection is about, -1 for none
    # Class as which it would be correct with its error repaired, -1: a repair removes it.
    repaired: Int[np.ndarray, " e"]
    found: Bool[np.ndarray, " m"]  # truth boxes taken, group-of boxes hit
    claimed: Bool[np.ndarray, " m"]  # targets of a class or localisation error


def classify(
    truth: Truth,
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_classes: int,
    *,
    counts_groups: bool = True,
) -> Outcomes:
    """What the evaluated detections of whole images are (arguments as `match_detections`).

    Without `counts_groups` group-of boxes only absorb what lies in them.
    """
    matches = openimages.match_detections(
        truth, image_index, classes, scores, boxes, num_classes, IOU
    )
    if not counts_groups:
        matches = matches._replace(groups=matches.groups[:0], group_scores=matches.group_scores[:0])
    found = np.zeros(len(truth.boxes), bool)
    found[matches.matched_idx[matches.kinds == openimages.TRUE]] = True
    found[matches.groups] = True

    status = np.full(len(matches.rows), BACKGROUND, np.int8)
    target = np.full(len(matches.rows), -1, np.int64)
    status[matches.kinds == openimages.TRUE] = CORRECT
    status[matches.kinds == openimages.ABSORBED] = ABSORBED
    wrong = np.flatnonzero(matches.kinds == openimages.FALSE)
    own_overlap = matches.overlaps[wrong]
    # A larger overlap than with its own class can only be with an object of another one.
    any_overlap, any_target = best_objects(
        truth, image_index[matches.rows[wrong]], boxes[matches.rows[wrong]], num_classes
    )
    kinds = np.select(
        [own_overlap >= IOU, any_overlap >= IOU, own_overlap >= MIN_IOU, any_overlap >= MIN_IOU],
        [DUPLICATE, CLASS, LOCALISATION, BOTH],
        BACKGROUND,
    )
    status[wrong] = kinds
    own = np.isin(status, (CORRECT, DUPLICATE, LOCALISATION))
    target[own] = matches.matched_idx[own]
    other = np.isin(kinds, (CLASS, BOTH))
    target[wrong[other]] = any_target[other]

    repaired = np.full(len(matches.rows), -1, np.int16)
    claimed = np.zeros(len(truth.boxes), bool)
    for error in (CLASS, LOCALISATION):
        rows = np.flatnonzero(status == error)
        claimed[target[rows]] = True
        rows = rows[~found[target[rows]]]
        # Of several detections about one object the best-scored becomes the correct one.
        rows = rows[np.argsort(-scores[matches.rows[rows]], kind="stable")]
        _, first = np.unique(target[rows], return_index=True)
        repaired[rows[first]] = truth.keys[target[rows[first]]] % num_classes
    return Outcomes(matches, status, target, repaired, found, claimed)


def best_objects(
    truth: Truth,
    image_index: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_classes: int,
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Largest IoU with any single object of the image, and its row of the truth as annotated.

    -1 and -1 where the image has no object.
    """
    objects = np.flatnonzero(truth.own & ~truth.group_of)
    overlap, best = openimages.best_overlaps(
        boxes.astype(np.float64),
        image_index.astype(np.int64),
        truth.boxes[objects],
        truth.keys[objects] // num_classes,
        len(truth.evaluated),
        union=True,
    )
    target = np.full(len(boxes), -1, np.int64)
    target[overlap >= 0] = objects[best[overlap >= 0]]
    return overlap, target


def confused(
    truth: Truth,
    image_index: Int[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    num_classes: int,
) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " u"]]:
    """Detections of unverified classes, which the metric leaves out, and what they lie on.

    Returns:
      rows: detections with an area whose class nobody verified in the image.
      target: row of the truth with IoU >= 0.5, -1 for none.
    """
    skipped = ~truth.evaluated[image_index, classes]
    rows = np.flatnonzero(skipped & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3]))
    overlap, target = best_objects(truth, image_index[rows], boxes[rows], num_classes)
    return rows, np.where(overlap >= IOU, target, -1)
