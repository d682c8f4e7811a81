"""The contract of an operator (`ensemble.operators` explains it)."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ensemble.operators.kernels import GroupBoxes, GroupMask, GroupScores


class Fused(NamedTuple):
    """What an operator makes of groups; None: as it was."""

    valid: GroupMask
    scores: GroupScores | None = None
    boxes: GroupBoxes | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """Base of the operators: hashable, so that a jitted function takes one as static argument."""

    keeps_single = False  # whether an entry without company comes out as it is

    @property
    def uses_models(self) -> bool:
        """Whether `fuse` looks at the model indices."""
        return False

    def fuse(
        self,
        boxes: GroupBoxes,
        scores: GroupScores,
        models: Int[Array, "N G"] | None,
        valid: GroupMask,
    ) -> Fused:
        """Works on groups in the layout of `ensemble.operators.kernels` (groups last).

        Args:
          boxes: (4, N, G) finite.
          scores: not negative, falling along N among the valid entries; equal ones by row.
          models: index of the model an entry comes from; None when `uses_models` is False.
          valid: real entries; they come first.
        """
        raise NotImplementedError

    def __call__(
        self,
        boxes: Float[Array, "G N 4"],
        scores: Float[Array, "G N"],
        models: Int[Array, "G N"],
        valid: Bool[Array, "G N"],
    ) -> tuple[Float[Array, "G N 4"], Float[Array, "G N"], Bool[Array, "G N"]]:
        """Groups first, entries in any order; jit it, with fixed shapes.

        Returns boxes, scores and what is valid by falling rank of the input: entry n belongs to
        the n-th best of the group.
        """
        order = jnp.lexsort((-scores, ~valid), axis=-1)
        boxes = jnp.take_along_axis(boxes, order[..., None], axis=1)
        scores, models, valid = (
            jnp.take_along_axis(a, order, axis=1) for a in (scores, models, valid)
        )
        fused = self.fuse(jnp.transpose(boxes, (2, 1, 0)), scores.T, models.T, valid.T)
        if fused.boxes is not None:
            boxes = jnp.transpose(fused.boxes, (2, 1, 0))
        return boxes, scores if fused.scores is None else fused.scores.T, fused.valid.T
