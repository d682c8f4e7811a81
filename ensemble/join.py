"""Joins the detections of two children into those of their parent: the inner node of a tree.

A node gets the rows of its two children, sorted by group (image and class), then score descending.
It

1. multiplies the scores of each child by its weight and ranks all rows of a group together;
2. unless its type is "soft", runs NMS: a row overlapping a kept better one is dropped;
3. gives each kept row its partner: the row of the other child that overlaps it most, above the
   same threshold. With S and B its score and box, S' and B' those of the partner (eq. 8 and 9 of
   the paper for one voter):

       S <- (S + vote * S') / norm,    B <- (1 - box) * B + box * B'

   where norm is the largest possible numerator for scores up to 1, so scores stay in [0, 1];
4. types "soft" and "adj": decays the scores by Gaussian soft-NMS, in order of the decayed scores.

Element dropout: of a child reduced to its "scores" no row is kept and no box is merged, its scores
only vote; of one reduced to its "boxes" no row is kept and no score votes.

Merging a table and scoring a candidate of the search both run this function, so they agree.

Kernels work on blocks (N, G): N places of a group along the first axis, groups along the last,
so that every operation runs over contiguous groups however small they are.

Shape legend: n rows, G groups of a block, N places of a group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64

ELEMENTS = ("both", "scores", "boxes")
NMS_TYPES = ("nms", "soft", "adj")
_BLOCK = 1 << 14  # places of a block: a few arrays of it fit the second-level cache
_SIZES = sorted({max(2, (1 << k)) for k in range(1, 24)} | {3 << k for k in range(24)})


class NodeRows(NamedTuple):
    """Detections of a tree's node, sorted by group, then score descending.

    Attributes:
      group: any key of image and class in [0, 2**31).
      scores: finite, not negative.
      columns: xmin, ymin, xmax, ymax.
      source: row number of the leaf's detection that was kept, in the caller's numbering.
      moved: the box is no longer that of `source`.
    """

    group: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    columns: Float32[np.ndarray, "4 n"]
    source: Int64[np.ndarray, " n"]
    moved: Bool[np.ndarray, " n"]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)


def leaf_rows(
    group: Int64[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
    source: Int64[np.ndarray, " n"],
) -> NodeRows:
    """Sorts the rows of one table; equal scores of a group keep their order.

    Raises:
      ValueError: a group outside [0, 2**31).
    """
    if len(group) and not 0 <= group.min() <= group.max() < 1 << 31:
        raise ValueError(f"groups from {group.min()} to {group.max()}, expected [0, 2**31)")
    order = _rank(group, scores)
    return NodeRows(
        group=np.asarray(group, np.int64)[order],
        scores=np.asarray(scores, np.float32)[order],
        columns=np.ascontiguousarray(np.asarray(boxes, np.float32)[order].T),
        source=np.asarray(source, np.int64)[order],
        moved=np.zeros(len(order), bool),
    )


def join(
    left: NodeRows,
    right: NodeRows,
    *,
    weights: tuple[float, float],
    elements: tuple[str, str],
    vote: float,
    box: float,
    nms: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
) -> NodeRows:
    """Rows of the parent; see the head of this module.

    Args:
      left: rows of the first child; wins equal scores.
      right: rows of the second child.
      weights: of the children's scores.
      elements: of ELEMENTS, what each child contributes; at least one "both".
      vote: weight of the partner's score.
      box: weight of the partner's box, in [0, 1].
      nms: of NMS_TYPES.
      iou_threshold: overlaps above it are the same object.
      sigma: of the Gaussian decay exp(-IoU^2 / sigma).
      min_score: type "soft" drops rows whose score decays below it.
    """
    num_left = len(left.scores)
    scores = np.concatenate([left.scores * np.float32(weights[0]), right.scores * np.float32(weights[1])])
    group = np.concatenate([left.group, right.group])
    order = _rank(group, scores)
    group, scores = group[order], scores[order]
    # One dummy place at the end stands for padding.
    n = len(order)
    columns = np.zeros((4, n + 1), np.float32)
    for column, a, b in zip(columns, left.columns, right.columns, strict=True):
        np.take(np.concatenate([a, b]), order, out=column[:n])
    side = np.full(n + 1, 2, np.int8)
    np.greater_equal(order, num_left, out=side[:n], casting="unsafe")
    enters = np.array([elements[0] == "both", elements[1] == "both", False])

    starts, sizes = _runs(group)
    alive = enters[side]
    partner = np.full(n + 1, -1, np.int32)
    for places in _blocks(starts, sizes, n):
        block_alive, block_partner = _match(
            tuple(column[places] for column in columns),
            side[places],
            alive[places],
            np.float32(iou_threshold),
            np.bool_(nms != "soft"),
        )
        alive[places] = block_alive
        partner[places] = block_partner
    kept = np.flatnonzero(alive[:n])
    partner = partner[kept]
    paired = np.flatnonzero(partner >= 0)
    mate = np.repeat(starts, sizes)[kept[paired]] + partner[paired]

    group, scores_out, columns_out = group[kept], scores[kept], columns[:, kept]
    order = order[kept]
    source = np.concatenate([left.source, right.source])[order]
    moved = np.concatenate([left.moved, right.moved])[order]
    mate_side = side[mate]
    gives_score = np.array([element != "boxes" for element in elements])
    gives_box = np.array([element != "scores" for element in elements])
    if vote:
        scores_out[paired] += np.where(gives_score[mate_side], np.float32(vote), 0) * scores[mate]
    norms = [
        weights[own] + vote * weights[1 - own] * bool(gives_score[1 - own])
        for own in (0, 1)
        if enters[own]
    ]
    scores_out /= np.float32(max(norms))
    if box:
        use = gives_box[mate_side]
        to, mate = paired[use], mate[use]
        keep_share, share = np.float32(1 - box), np.float32(box)
        for out, column in zip(columns_out, columns, strict=True):
            out[to] = keep_share * out[to] + share * column[mate]
        moved[to] = True
    rows = NodeRows(group, scores_out, columns_out, source, moved)
    if vote:
        rows = _take(rows, _rank(group, scores_out))
    if nms != "nms":
        rows = _decay(rows, sigma)
    if nms == "soft":
        rows = _take(rows, np.flatnonzero(rows.scores >= np.float32(min_score)))
    return rows


def _decay(rows: NodeRows, sigma: float) -> NodeRows:
    """Gaussian soft-NMS that drops nothing; the rows come back in order of the new scores."""
    n = len(rows.scores)
    columns = np.concatenate([rows.columns, np.zeros((4, 1), np.float32)], axis=1)
    scores = np.append(rows.scores, np.float32(-1))
    starts, sizes = _runs(rows.group)
    decayed = scores.copy()
    order = np.arange(n + 1)
    for places in _blocks(starts, sizes, n):
        block_scores, block_order = _soft(
            tuple(column[places] for column in columns), scores[places], np.float32(sigma)
        )
        decayed[places] = block_scores
        order[places] = np.minimum(places[0] + np.asarray(block_order), n)
    order = order[:n]
    return NodeRows(
        rows.group,
        decayed[:n],
        columns[:, order],
        rows.source[order],
        rows.moved[order],
    )


def _rank(group: Int64[np.ndarray, " n"], scores: Float32[np.ndarray, " n"]) -> np.ndarray:
    """Order by group, then score descending, then place."""
    # Bits of floats that are not negative rise with their value; adding 0 turns -0 into +0.
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)
    return np.argsort((group << 32) | (0xFFFFFFFF - bits), kind="stable")


def _runs(group: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return starts, np.diff(starts, append=len(group))


def _blocks(starts: np.ndarray, sizes: np.ndarray, dummy: int):
    """Yields (N, G) row numbers of all groups with two rows or more; padding is row `dummy`."""
    bucket = np.searchsorted(_SIZES, sizes)
    for index in range(len(_SIZES)):
        chosen = np.flatnonzero((bucket == index) & (sizes > 1))
        if not len(chosen):
            continue
        size = _SIZES[index]
        width = max(_BLOCK // size // 16 * 16, 16)
        ranks = np.arange(size)[:, None]
        for first in range(0, len(chosen), width):
            part = chosen[first : first + width]
            places = np.full((size, width), dummy)
            places[:, : len(part)] = np.where(ranks < sizes[part], starts[part] + ranks, dummy)
            yield places


def _take(rows: NodeRows, index: np.ndarray) -> NodeRows:
    return NodeRows(
        rows.group[index],
        rows.scores[index],
        rows.columns[:, index],
        rows.source[index],
        rows.moved[index],
    )


def _overlap(columns, areas, i):
    """(N, G) IoU of place i of each group with all its places, as `common.boxes.iou` has it."""
    x0, y0, x1, y1 = columns
    width = jnp.minimum(x1, x1[i]) - jnp.maximum(x0, x0[i])
    height = jnp.minimum(y1, y1[i]) - jnp.maximum(y0, y0[i])
    return _ratio(width, height, areas, areas[i])


def _ratio(width, height, areas, area):
    shared = jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)
    union = areas + area - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)


def _areas(columns):
    x0, y0, x1, y1 = columns
    return jnp.maximum(x1 - x0, 0.0) * jnp.maximum(y1 - y0, 0.0)


@jax.jit
def _match(
    columns: tuple[Float[Array, "N G"], ...],
    side: Int[Array, "N G"],
    enters: Bool[Array, "N G"],
    iou_threshold: Float[Array, ""],
    hard: Bool[Array, ""],
) -> tuple[Bool[Array, "N G"], Int32[Array, "N G"]]:
    """Greedy NMS of the entering rows, and each row's partner on the other side (-1: none)."""
    areas = _areas(columns)
    places = jnp.arange(side.shape[0])[:, None]

    def visit(i, state):
        alive, best, partner = state
        overlap = _overlap(columns, areas, i)
        same = overlap > iou_threshold
        alive = alive & ~(same & alive[i] & (places > i) & hard)
        better = (overlap > best) & (side != side[i])
        return alive, jnp.where(better, overlap, best), jnp.where(better, i, partner)

    best = jnp.full(side.shape, iou_threshold)
    partner = jnp.full(side.shape, -1, jnp.int32)
    alive, _, partner = lax.fori_loop(0, side.shape[0], visit, (enters, best, partner))
    return alive, partner


@jax.jit
def _soft(
    columns: tuple[Float[Array, "N G"], ...], scores: Float[Array, "N G"], sigma: Float[Array, ""]
) -> tuple[Float[Array, "N G"], Int32[Array, "N G"]]:
    """Scores by falling decayed score and the place each comes from; padding has score -1."""
    areas = _areas(columns)
    x0, y0, x1, y1 = columns
    size = scores.shape[0]
    places = jnp.arange(size)[:, None]

    def visit(i, state):
        left, decayed, order = state
        top = left.max(axis=0)
        chosen = jnp.where(left == top, places, size - 1).min(axis=0)

        def pick(column):
            return jnp.take_along_axis(column, chosen[None], axis=0)

        width = jnp.minimum(x1, pick(x1)) - jnp.maximum(x0, pick(x0))
        height = jnp.minimum(y1, pick(y1)) - jnp.maximum(y0, pick(y0))
        overlap = _ratio(width, height, areas, pick(areas))
        rest = left * jnp.exp(-(overlap * overlap) / sigma)
        # Visited places sink to -2, below padding, which is so visited last.
        left = jnp.where(places == chosen, -2.0, jnp.where(left >= 0, rest, left))
        return left, decayed.at[i].set(top), order.at[i].set(chosen)

    empty = jnp.zeros(scores.shape, jnp.int32)
    _, decayed, order = lax.fori_loop(0, size, visit, (scores, scores, empty))
    return decayed, order
