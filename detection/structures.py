"""What proposal network, box heads, assignment and losses hand to one another.

Shape legend
  B  images
  P  proposals per image
  R  RoIs per image: sampled ones in training, all proposals in inference
  F  RoIs with a regressed box, the first F of the R. In training all positives are among them,
     because sampling puts positives first; in inference F = R
  K  classes
  L  class logits of a RoI, see `detection.classifiers`
  k  boxes per RoI: K, or 1 when all classes share a box
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

# Features (B,R,S,S,C) of boxes (B,R,4), with optional shifts of each bin (B,R,S,S,2).
Pool = Callable[..., Array]


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first."""

    boxes: Float[Array, "B P 4"]
    valid: Bool[Array, "B P"]
    logits: Float[Array, "B P"] | None = None  # objectness, where the network made the boxes


class RoITargets(NamedTuple):
    """Sampled RoIs of a batch and what each should become."""

    boxes: Float[Array, "B R 4"]
    labels: Int[Array, "B R"]  # 0 background, class + 1 otherwise
    gt_boxes: Float[Array, "B R 4"]  # the matched ground-truth box of a positive RoI
    valid: Bool[Array, "B R"]
    is_gt: Bool[Array, "B R"]  # the RoI is itself a ground-truth box
    matched_idx: Int[Array, "B R"]  # which of the batch's boxes `gt_boxes` is
    weights: Float[Array, "B R"] | None = None  # of the losses of a RoI; None: all 1

    def first(self, count: int) -> "RoITargets":
        """The targets of the first `count` RoIs of each image."""
        return jax.tree.map(lambda values: values[:, :count], self)

    def weighted(self, losses: Float[Array, "B R"]) -> Float[Array, "B R"]:
        """Losses of all RoIs times their weights."""
        return losses if self.weights is None else losses * self.weights

    def counted(self, image_valid: Bool[Array, " B"]) -> Bool[Array, "B R"]:
        """RoIs of real images that were sampled."""
        return self.valid & image_valid[:, None]

    def positive(self, image_valid: Bool[Array, " B"]) -> Bool[Array, "B R"]:
        """RoIs of real images that are matched to an object."""
        return self.counted(image_valid) & (self.labels > 0)


class HeadOutput(NamedTuple):
    """Class logits of all RoIs, and box deltas of the first F of them."""

    logits: Float[Array, "B R L"] | None  # None: the head does not classify
    deltas: Float[Array, "B F k 4"]
    references: Float[Array, "B F 4"]  # boxes that the deltas are relative to
    sibling: "HeadOutput | None" = None  # of the plain head that trains beside a Decoupling Head

    def with_logits(self, change: Callable[[Array], Array]) -> "HeadOutput":
        """The output with changed logits, those of the sibling too; without logits itself."""
        if self.logits is None:
            return self
        sibling = None if self.sibling is None else self.sibling.with_logits(change)
        return self._replace(logits=change(self.logits), sibling=sibling)


def of_class(
    values: Float[Array, "B F k 4"], classes: Int[Array, "B F"] | None
) -> Float[Array, "B F 4"]:
    """The row of each RoI's class, zeros where that is -1; the only row if there is one."""
    if values.shape[2] == 1:
        return values[:, :, 0]
    chosen = jax.nn.one_hot(classes, values.shape[2], dtype=values.dtype)
    return (values * chosen[..., None]).sum(axis=2)
