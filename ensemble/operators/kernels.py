"""What the operators are made of: overlaps of one entry with its group, greedy NMS, decay.

Many small groups are worked on at once, one lane each, so the groups are the last axis: every step
is arithmetic on whole rows of groups, for the vector units of a CPU as for those of a TPU or GPU.
No (N, N) matrix is built: each step needs one row of it.

Shape legend:
  N: entries of a group (padded)   G: groups
  boxes (4, N, G): xmin, ymin, xmax, ymax of the entries, by falling score
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

GroupBoxes = Float[Array, "4 N G"]
GroupScores = Float[Array, "N G"]
GroupMask = Bool[Array, "N G"]


def positions(like: Array) -> Int[Array, "N 1"]:
    """Position of the entries in their group."""
    return jnp.arange(like.shape[-2], dtype=jnp.int32)[:, None]


def areas(boxes: Float[Array, "4 ..."]) -> Float[Array, "..."]:
    """Zero for boxes with a side that is not positive."""
    xmin, ymin, xmax, ymax = boxes
    return jnp.maximum(xmax - xmin, 0.0) * jnp.maximum(ymax - ymin, 0.0)


def overlaps(one: Float[Array, "4 G"], boxes: GroupBoxes) -> GroupScores:
    """IoU of one box a group with all boxes of the group; zero where the union is empty."""
    one = one[:, None]
    width = jnp.minimum(one[2], boxes[2]) - jnp.maximum(one[0], boxes[0])
    height = jnp.minimum(one[3], boxes[3]) - jnp.maximum(one[1], boxes[1])
    shared = jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)
    union = areas(one) + areas(boxes) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)


def entry(array: Float[Array, "... N G"], index: Int[Array, ""]) -> Float[Array, "... G"]:
    """The entry at one position, of all groups."""
    return lax.dynamic_index_in_dim(array, index, axis=array.ndim - 2, keepdims=False)


def entry_of_each(boxes: GroupBoxes, index: Int[Array, " G"]) -> Float[Array, "4 G"]:
    """The entry at each group's own position."""
    return jnp.take_along_axis(boxes, index[None, None], axis=1)[:, 0]


def first_best(
    values: GroupScores, mask: GroupMask
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
    """Largest value under the mask and its first position (-1 and 0 where the mask is empty).

    Args:
      values: not negative.
      mask: entries that count.
    """
    masked = jnp.where(mask, values, -1.0)
    best = jnp.max(masked, axis=0)
    size = values.shape[0]
    index = jnp.min(jnp.where(masked == best, positions(values), size), axis=0)
    return best, jnp.minimum(index, size - 1)


def greedy(
    boxes: GroupBoxes, valid: GroupMask, iou_threshold: float
) -> tuple[GroupMask, Int[Array, "N G"], GroupScores]:
    """Greedy NMS: visits the entries in order; a kept one suppresses later ones it overlaps.

    Args:
      boxes: by falling score.
      valid: real entries.
      iou_threshold: an entry is suppressed when its IoU with a kept one is greater.

    Returns:
      keep; owner: position of the kept entry that suppressed this one (the first that overlaps
      it; its own position for the others); overlap: IoU with the owner (0 for the others).
    """
    at = positions(boxes)

    def visit(i, state):
        alive, owner, overlap = state
        iou = overlaps(entry(boxes, i), boxes)
        hit = (iou > iou_threshold) & alive & (at > i) & entry(alive, i)
        return alive & ~hit, jnp.where(hit, i, owner), jnp.where(hit, iou, overlap)

    n = boxes.shape[1]
    own = jnp.broadcast_to(at, valid.shape)
    state = (valid, own, jnp.zeros(valid.shape, boxes.dtype))
    return lax.fori_loop(0, n - 1, visit, state)


def decay(
    boxes: GroupBoxes,
    scores: GroupScores,
    active: GroupMask,
    factor: Callable[[GroupScores], GroupScores],
) -> GroupScores:
    """Soft-NMS: selects the best active entry again and again; it lowers all not yet selected.

    The best is looked for after every step, since the decay changes the order. Of equal scores the
    first position goes first.

    Args:
      boxes: in any order.
      scores: not negative.
      active: entries that take part.
      factor: what IoU multiplies the score by, in [0, 1].

    Returns:
      The scores; those of entries that are not active stay.
    """
    at = positions(boxes)

    def step(_, state):
        scores, pending = state
        _, best = first_best(scores, pending)
        pending = pending & (at != best)
        lowered = scores * factor(overlaps(entry_of_each(boxes, best), boxes))
        return jnp.where(pending, lowered, scores), pending

    # The last entry has nothing to lower.
    steps = jnp.max(jnp.sum(active, axis=0, dtype=jnp.int32)) - 1
    return lax.fori_loop(0, steps, step, (scores, active))[0]


def decay_in_order(
    boxes: GroupBoxes,
    scores: GroupScores,
    active: GroupMask,
    factor: Callable[[GroupScores], GroupScores],
) -> GroupScores:
    """One-pass form of `decay`: every active entry lowers the later ones, order as given."""
    at = positions(boxes)

    def step(i, scores):
        lowered = scores * factor(overlaps(entry(boxes, i), boxes))
        return jnp.where(active & entry(active, i) & (at > i), lowered, scores)

    return lax.fori_loop(0, boxes.shape[1] - 1, step, scores)


def gaussian(sigma: float) -> Callable[[GroupScores], GroupScores]:
    """exp(-IoU^2 / sigma)."""
    return lambda iou: jnp.exp(iou * iou * (-1.0 / sigma))


def linear(iou_threshold: float) -> Callable[[GroupScores], GroupScores]:
    """1 - IoU above the threshold, 1 elsewhere."""
    return lambda iou: jnp.where(iou > iou_threshold, 1.0 - iou, 1.0)
