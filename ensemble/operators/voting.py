"""The paper's voting (equations 8 and 9): suppressed boxes vote on the one that suppressed them.

Follows the contract in `ensemble.operators`. Shape legend: N entries of a group, G groups.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from ensemble.operators import kernels
from ensemble.operators.kernels import GroupBoxes, GroupMask, GroupScores
from ensemble.operators.operator import Fused, Operator


@dataclasses.dataclass(frozen=True)
class Voting(Operator):
    """Greedy NMS whose kept boxes P are adjusted by votes, then Gaussian decay.

    An entry that NMS drops belongs to the kept entry that dropped it: the best-scored one whose
    IoU with it is greater than `iou_threshold`. Of the entries that belong to P the k with the
    greatest IoU with P vote (equal IoUs: the better rank); k' of them, fewer than k where P has
    not dropped as many.

      score (eq. 8)  C = S_P + score_weight * sum_i S_i
      box   (eq. 9)  B = (1 - box_weight) B_P + box_weight * mean_i B_i

    The paper leaves open what happens when k' < k. few="mean": the mean goes over k' votes (no
    vote: B = B_P). few="fixed": each vote weighs box_weight / k as printed, and what missing
    votes would weigh stays with B_P, because dropping it would draw the box to the origin.

    Scores may exceed 1 (up to 1 + k * score_weight = 1.2). Then, unless `sigma` is None, the
    adjusted boxes lower one another by their adjusted scores as in `AdjNms` (sequential); nothing
    is dropped by that.
    """

    iou_threshold: float = 0.5
    k: int = 4
    score_weight: float = 0.05
    box_weight: float = 0.3
    few: Literal["mean", "fixed"] = "mean"
    sigma: float | None = 0.5

    keeps_single = True

    def fuse(self, boxes: GroupBoxes, scores: GroupScores, models, valid: GroupMask) -> Fused:
        at = kernels.positions(boxes)
        keep, owner, overlap = kernels.greedy_owners(boxes, valid, self.iou_threshold)

        def count_better(i, now, better):
            (iou, its_owner), _ = now
            wins = (iou > overlap) | ((iou == overlap) & (i < at))
            return better + jnp.where((its_owner == owner) & wins, 1, 0)

        better = kernels.walk(
            (overlap, owner), count_better, jnp.zeros(valid.shape, jnp.int32), start=1
        )
        votes_for = jnp.where(better < self.k, owner, -1)

        def add_vote(_, now, state):
            (box, score, candidate), _ = now
            box_sum, score_sum, count = state
            elected = candidate == at
            return (
                box_sum + jnp.where(elected, box[:, None], 0.0),
                score_sum + jnp.where(elected, score, 0.0),
                count + jnp.where(elected, 1.0, 0.0),
            )

        none = jnp.zeros_like(scores)
        state = (jnp.zeros_like(boxes), none, none)
        box_sum, score_sum, count = kernels.walk(
            (boxes, scores, votes_for), add_vote, state, start=1
        )
        scores = scores + self.score_weight * score_sum
        share = self.box_weight / (jnp.maximum(count, 1.0) if self.few == "mean" else float(self.k))
        boxes = (1.0 - share * count) * boxes + share * box_sum
        if self.sigma is not None:
            scores = kernels.decay(boxes, scores, keep, kernels.gaussian(self.sigma))
        return Fused(valid=keep, scores=scores, boxes=boxes)
