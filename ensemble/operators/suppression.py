"""NMS, soft-NMS and adj-NMS: boxes stay, scores fall or rows go.

All follow the contract in `ensemble.operators`. Shape legend: N entries of a group, G groups.
"""

import dataclasses
from typing import Literal

from ensemble.operators import kernels
from ensemble.operators.kernels import GroupBoxes, GroupMask, GroupScores
from ensemble.operators.operator import Fused, Operator


@dataclasses.dataclass(frozen=True)
class Nms(Operator):
    """Greedy NMS.

    Entries are visited by falling score (equal scores: by row). One is dropped when its IoU with
    an entry kept before it is greater than `iou_threshold`, in float32.

    `ensemble_boxes.nms` decides the same, except that it visits equal scores in no defined order
    (the reverse of an unstable sort) and compares IoUs in float64 even for float32 boxes, which
    differs where an IoU is within one rounding of the threshold. It also drops boxes of zero area;
    here they stay and overlap nothing.
    """

    iou_threshold: float = 0.5

    keeps_single = True

    def fuse(self, boxes: GroupBoxes, scores: GroupScores, models, valid: GroupMask) -> Fused:
        return Fused(valid=kernels.greedy(boxes, valid, self.iou_threshold))


@dataclasses.dataclass(frozen=True)
class SoftNms(Operator):
    """Soft-NMS (Bodla et al. 2017): a selected entry lowers the scores of those that follow.

    The best entry left is selected (equal scores: by row), then each entry not yet selected is
    multiplied by exp(-IoU^2 / sigma) ("gaussian"), or by 1 - IoU where the IoU is greater than
    `iou_threshold` ("linear"). The ranking is looked at anew after every step. At the end entries
    whose score is greater than `min_score` are kept, with their lowered scores.

    `ensemble_boxes.soft_nms` selects the same entries but returns the *unlowered* scores of the
    rows it keeps (it lowers a copy), so that its output ranks like its input. Among equal scores
    it goes by the order of a list that it permutes while it works.
    """

    method: Literal["gaussian", "linear"] = "gaussian"
    sigma: float = 0.5
    iou_threshold: float = 0.3
    min_score: float = 1e-3

    def fuse(self, boxes: GroupBoxes, scores: GroupScores, models, valid: GroupMask) -> Fused:
        factor = (
            kernels.gaussian(self.sigma)
            if self.method == "gaussian"
            else kernels.linear(self.iou_threshold)
        )
        scores = kernels.decay(boxes, scores, valid, factor)
        return Fused(scores=scores, valid=valid & (scores > self.min_score))


@dataclasses.dataclass(frozen=True)
class AdjNms(Operator):
    """The paper's adj-NMS (section 3): greedy NMS, then Gaussian decay among the survivors.

    The survivors have IoUs of at most `iou_threshold`, so a factor is at least exp(-0.25 / sigma)
    with the default threshold. Suppressed entries take no part in the decay; nothing is dropped
    by it. `sequential` selects anew after every step, as soft-NMS does; otherwise the order before
    the decay is kept (one pass).
    """

    iou_threshold: float = 0.5
    sigma: float = 0.5
    sequential: bool = True

    keeps_single = True

    def fuse(self, boxes: GroupBoxes, scores: GroupScores, models, valid: GroupMask) -> Fused:
        keep = kernels.greedy(boxes, valid, self.iou_threshold)
        lower = kernels.decay if self.sequential else kernels.decay_in_order
        return Fused(scores=lower(boxes, scores, keep, kernels.gaussian(self.sigma)), valid=keep)
