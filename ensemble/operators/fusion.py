"""Weighted boxes fusion and non-maximum weighted: clusters become one box each.

Both follow the contract in `ensemble.operators`. A cluster lives in the slot of the entry that
founded it. Shape legend: N entries of a group, G groups, M models.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ensemble.operators import kernels
from ensemble.operators.kernels import GroupBoxes, GroupMask, GroupScores
from ensemble.operators.operator import Fused, Operator

_MODELS_PER_WORD = 31
_TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Nmw(Operator):
    """Non-maximum weighted (Zhou et al., ICCV workshops 2017).

    Entries are visited by falling score (equal scores: by row). One joins the cluster whose
    founder it overlaps most, when that IoU is greater than `iou_threshold` (equal IoUs: the
    earliest cluster); otherwise it founds a cluster. The box of a cluster is the mean of its boxes
    weighted by score * IoU with the founder, its score the founder's.

    Equals `ensemble_boxes.non_maximum_weighted`, except that this returns NaN boxes for clusters
    whose scores are all zero; here they keep the founder's box.
    """

    iou_threshold: float = 0.55

    keeps_single = True

    def fuse(self, boxes: GroupBoxes, scores: GroupScores, models, valid: GroupMask) -> Fused:
        at = kernels.positions(boxes)

        def visit(j, now, state):
            (box, score, real), _ = now
            founded, total, mass = state
            best, slot = kernels.first_best(kernels.overlaps(box, boxes), founded)
            matched = best > self.iou_threshold
            weight = score * jnp.where(matched, best, 1.0)
            chosen = at == jnp.where(real, jnp.where(matched, slot, j), -1)
            return (
                jnp.where(chosen, 1.0, founded),
                total + jnp.where(chosen, weight * box[:, None], 0.0),
                mass + jnp.where(chosen, weight, 0.0),
            )

        none = jnp.zeros_like(scores)
        state = (none, jnp.zeros_like(boxes), none)
        founded, total, mass = kernels.walk((boxes, scores, valid), visit, state)
        several = mass > scores
        mean = jnp.where(several, total / jnp.where(several, mass, 1.0), boxes)
        return Fused(valid=founded > 0, boxes=mean)


@dataclasses.dataclass(frozen=True)
class WeightedBoxesFusion(Operator):
    """Weighted boxes fusion (Solovyev et al. 2021).

    Entries are visited by falling score (equal scores: by row). One joins the cluster whose
    *current mean box* it overlaps most, when that IoU is greater than `iou_threshold` (equal IoUs:
    the earliest cluster); otherwise it founds one. The box of a cluster is the mean of its boxes
    weighted by score, brought up to date at every join. Its score, from the scores s_i of its n
    entries, the weights w_m of all M models, and the weights of the models it came from:
      avg: mean(s_i) * min(M, n) / sum(w_m), or without the `min` when `allows_overflow`;
      max: max(s_i) / max(w_m);
      box_and_model_avg: sum(s_i) / sum_i(w_i) * sum(w_m of models in the cluster) / sum(w_m);
      absent_model_aware_avg: sum(s_i) / (sum_i(w_i) + sum(w_m of models not in the cluster)).

    The scores come multiplied by their model's weight, as everywhere here.

    "avg" counts entries, not models: several boxes of one model vouch for one another. The last two
    do not.

    Equals `ensemble_boxes.weighted_boxes_fusion`, except that this returns NaN boxes for clusters
    of several entries whose scores are all zero; here they keep the founder's box. Like NMW there,
    it passes labels through float32, so that those above 2^24 change.

    Attributes:
      model_weights: w_m of all models, also of those without entries.
    """

    model_weights: tuple[float, ...]
    iou_threshold: float = 0.55
    conf_type: Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"] = "avg"
    allows_overflow: bool = False

    @property
    def uses_models(self) -> bool:
        return self.conf_type in ("box_and_model_avg", "absent_model_aware_avg")

    def fuse(
        self,
        boxes: GroupBoxes,
        scores: GroupScores,
        models: Int[Array, "N G"] | None,
        valid: GroupMask,
    ) -> Fused:
        at = kernels.positions(boxes)

        def visit(j, now, state):
            (box, score, real, model), _ = now
            fused, total, mass, count, of_models = state
            best, slot = kernels.first_best(kernels.overlaps(box, fused), count)
            matched = best > self.iou_threshold
            chosen = at == jnp.where(real, jnp.where(matched, slot, j), -1)
            total = total + jnp.where(chosen, score * box[:, None], 0.0)
            mass = mass + jnp.where(chosen, score, 0.0)
            # The founder alone is its own mean, to the last bit.
            mean = jnp.where(matched, total / jnp.maximum(mass, _TINY), box[:, None])
            fused = jnp.where(chosen & (~matched | (mass > 0)), mean, fused)
            if of_models is not None:
                of_models = _add_model(of_models, model, chosen, self._weights)
            return fused, total, mass, count + jnp.where(chosen, 1.0, 0.0), of_models

        none = jnp.zeros_like(scores)
        words = -(-len(self.model_weights) // _MODELS_PER_WORD)
        of_models = (none, jnp.zeros((words, *none.shape), jnp.int32)) if self.uses_models else None
        state = (jnp.zeros_like(boxes), jnp.zeros_like(boxes), none, none, of_models)
        arrays = (boxes, scores, valid, models if self.uses_models else None)
        fused, _, mass, count, of_models = kernels.walk(arrays, visit, state)
        return Fused(count > 0, self._scores(scores, mass, count, of_models), fused)

    @property
    def _weights(self) -> np.ndarray:
        return np.array(self.model_weights, np.float32)

    def _scores(
        self,
        top: GroupScores,
        mass: GroupScores,
        count: GroupScores,
        of_models: tuple[GroupScores, Int[Array, "words N G"]] | None,
    ) -> GroupScores:
        """Scores of the clusters; `top` is the founder's, which is the best of its cluster."""
        weights = self._weights
        if self.conf_type == "max":
            return top / weights.max()
        if self.conf_type == "avg":
            share: Array | float = 1.0
            if not self.allows_overflow:
                share = jnp.minimum(len(weights), count) / jnp.maximum(count, 1.0)
            return mass * share / weights.sum()
        assert of_models is not None  # the other types of confidence count models
        entry_weights, seen = of_models
        by_bit = np.zeros((len(seen) * _MODELS_PER_WORD, 1, 1), np.float32)
        by_bit[: len(weights), 0, 0] = weights
        bit = jnp.arange(_MODELS_PER_WORD, dtype=jnp.int32)[:, None, None]
        bits = ((seen[:, None] >> bit) & 1).reshape(-1, *mass.shape)
        present = jnp.sum(bits * by_bit, axis=0)
        if self.conf_type == "box_and_model_avg":
            numerator, denominator = mass * present, entry_weights * weights.sum()
        else:
            numerator, denominator = mass, entry_weights + (weights.sum() - present)
        return numerator / jnp.where(denominator > 0, denominator, 1.0)


def _add_model(
    of_models: tuple[GroupScores, Int[Array, "words N G"]],
    model: Int[Array, " G"],
    chosen: GroupMask,
    weights: np.ndarray,
) -> tuple[GroupScores, Int[Array, "words N G"]]:
    """Adds the model of one entry to the chosen clusters: its weight, and a bit in a set."""
    entry_weights, seen = of_models
    entry_weights = jnp.where(chosen, entry_weights + jnp.asarray(weights)[model], entry_weights)
    word = jnp.arange(seen.shape[0])[:, None]
    bits = jnp.where(
        model // _MODELS_PER_WORD == word, jnp.left_shift(1, model % _MODELS_PER_WORD), 0
    )
    return entry_weights, jnp.where(chosen, seen | bits[:, None], seen)
