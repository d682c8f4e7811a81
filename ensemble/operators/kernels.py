"""What the operators are made of: overlaps of one entry with its group, greedy NMS, decay.

Many small groups are worked on at once, one lane each, so the groups are the last axis: every step
is arithmetic on whole rows of groups, for the vector units of a CPU as for those of a TPU or GPU.
No (N, N) matrix is built: each step needs one row of it.

Shape legend:
  N: entries of a group (padded)   G: groups
  boxes (4, N, G): xmin, ymin, xmax, ymax of the entries, by falling score
"""

from collections.abc import Callable
from typing import Any

import jax
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


def walk(
    arrays: Any,
    visit: Callable[[Int[Array, ""], Any, Any], Any],
    state: Any,
    *,
    start: int = 0,
    stop: int | Int[Array, ""] | None = None,
    watch: Callable[[Any], Any] = lambda state: (),
) -> Any:
    """Visits the entries of all groups in order: `state <- visit(i, entries, state)`.

    The entry to visit is handed from step to step. Sliced within a step, it would be fused into
    the arithmetic over all entries, which XLA:CPU then does not vectorise (measured: NMS takes 5
    to 10 times as long). Masks in states are float32, as wide as what they mask: another factor 2.

    Args:
      arrays: pytree of (..., N, G), none of which changes; or `watch` picks from the state.
      visit: gets the position, `(entries of arrays, entries of watch(state))` (..., G), the state.
      state: pytree.
      start: first position to visit.
      stop: end of the positions; None for N.
      watch: arrays of the state whose entries the visits need.
    """
    leaf = jax.tree.leaves((arrays, watch(state)))[0]
    stop = leaf.shape[-2] if stop is None else stop

    def entries(i, state):
        return jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, i, axis=a.ndim - 2, keepdims=False),
            (arrays, watch(state)),
        )

    def step(i, carry):
        now, state = carry
        state = visit(i, now, state)
        return entries(i + 1, state), state

    return lax.fori_loop(start, stop, step, (entries(start, state), state))[1]


def entry_of_each(boxes: GroupBoxes, index: Int[Array, " G"]) -> Float[Array, "4 G"]:
    """The entry at each group's own position."""
    return jnp.take_along_axis(boxes, index[None, None], axis=1)[:, 0]


def first_best(
    values: GroupScores, mask: GroupScores
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
    """Largest value where the mask is 1, and its first position (-1 and 0 where it is nowhere).

    Args:
      values: not negative.
      mask: 1 for entries that count, 0 for others.
    """
    masked = jnp.where(mask > 0, values, -1.0)
    best = jnp.max(masked, axis=0)
    size = values.shape[0]
    index = jnp.min(jnp.where(masked == best, positions(values), size), axis=0)
    return best, jnp.minimum(index, size - 1)


def greedy(boxes: GroupBoxes, valid: GroupMask, iou_threshold: float) -> GroupMask:
    """Greedy NMS: visits the entries in order; a kept one drops later ones that it overlaps.

    Args:
      boxes: by falling score.
      valid: real entries.
      iou_threshold: an entry is dropped when its IoU with a kept one is greater.

    Returns:
      The kept entries.
    """
    at = positions(boxes)

    def visit(i, now, alive):
        box, leads = now
        iou = overlaps(box, boxes)
        return jnp.where((iou * leads > iou_threshold) & (at > i), 0.0, alive)

    alive = valid.astype(boxes.dtype)
    return walk(boxes, visit, alive, stop=boxes.shape[1] - 1, watch=lambda alive: alive) > 0


def greedy_owners(
    boxes: GroupBoxes, valid: GroupMask, iou_threshold: float
) -> tuple[GroupMask, Int[Array, "N G"], GroupScores]:
    """Greedy NMS that remembers who dropped an entry; arguments as for `greedy`.

    Returns:
      keep; owner: position of the kept entry that dropped this one (the first that overlaps it),
      -1 for the others; overlap: IoU with the owner, 0 for the others.
    """
    at = positions(boxes)

    def visit(i, now, state):
        box, leads = now
        alive, owner, overlap = state
        iou = overlaps(box, boxes)
        hit = (iou * leads * alive > iou_threshold) & (at > i)
        return (jnp.where(hit, 0.0, alive), jnp.where(hit, i, owner), jnp.where(hit, iou, overlap))

    alive = valid.astype(boxes.dtype)
    state = alive, jnp.full(valid.shape, -1, jnp.int32), jnp.zeros_like(alive)
    alive, owner, overlap = walk(
        boxes, visit, state, stop=boxes.shape[1] - 1, watch=lambda state: state[0]
    )
    return alive > 0, owner, overlap


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
        pending = jnp.where(at == best, 0.0, pending)
        lowered = scores * factor(overlaps(entry_of_each(boxes, best), boxes))
        return jnp.where(pending > 0, lowered, scores), pending

    # The last entry has nothing to lower.
    steps = jnp.max(jnp.sum(active, axis=0, dtype=jnp.int32)) - 1
    return lax.fori_loop(0, steps, step, (scores, active.astype(scores.dtype)))[0]


def decay_in_order(
    boxes: GroupBoxes,
    scores: GroupScores,
    active: GroupMask,
    factor: Callable[[GroupScores], GroupScores],
) -> GroupScores:
    """One-pass form of `decay`: every active entry lowers the later ones, order as given."""
    at = positions(boxes)
    active = active.astype(scores.dtype)

    def visit(i, now, scores):
        (box, lowers), _ = now
        lowered = scores * factor(overlaps(box, boxes))
        return jnp.where((active * lowers > 0) & (at > i), lowered, scores)

    return walk((boxes, active), visit, scores, stop=boxes.shape[1] - 1)


def gaussian(sigma: float | Float[Array, ""]) -> Callable[[GroupScores], GroupScores]:
    """exp(-IoU^2 / sigma)."""
    return lambda iou: jnp.exp(iou * iou * (-1.0 / sigma))


def linear(iou_threshold: float) -> Callable[[GroupScores], GroupScores]:
    """1 - IoU above the threshold, 1 elsewhere."""
    return lambda iou: jnp.where(iou > iou_threshold, 1.0 - iou, 1.0)
