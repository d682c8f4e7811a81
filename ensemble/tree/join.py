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

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from ensemble.operators import kernels
from ensemble.operators.groups import rank_rows
from ensemble.operators.kernels import GroupBoxes, GroupMask, GroupScores

ELEMENTS = ("both", "scores", "boxes")
NMS_TYPES = ("nms", "soft", "adj")
_BLOCK = 1 << 14  # places of a block: a few arrays of it fit the second-level cache
_SIZES = sorted({max(2, (1 << k)) for k in range(1, 24)} | {3 << k for k in range(24)})


class NodeRows(NamedTuple):
    """Detections of a tree's node, sorted by group, then score descending.

    Attributes:
      group: key of image and class.
      scores: finite, not negative.
      columns: xmin, ymin, xmax, ymax.
      source: row number of the leaf's detection that was kept, in the caller's numbering.
      moved: the box is no longer that of `source`.
    """

    group: Int[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    columns: Float32[np.ndarray, "4 n"]
    source: Int[np.ndarray, " n"]
    moved: Bool[np.ndarray, " n"]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)


def leaf_rows(
    group: Int[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
    source: Int[np.ndarray, " n"],
) -> NodeRows:
    """Sorts the rows of one table; equal scores of a group keep their order."""
    order = rank_rows(group, scores)
    return NodeRows(
        group=group[order],
        scores=np.asarray(scores, np.float32)[order],
        columns=np.ascontiguousarray(np.asarray(boxes, np.float32)[order].T),
        source=source[order],
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
    weighted = [
        rows.scores * np.float32(weight)
        for rows, weight in zip((left, right), weights, strict=True)
    ]
    scores = np.concatenate(weighted)
    group = np.concatenate([left.group, right.group])
    order = rank_rows(group, scores)
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
    for places, stop in _blocks(starts, sizes, n):
        block_alive, block_partner = _match(
            columns.take(places, axis=1),
            side[places].astype(np.float32),
            alive[places],
            np.float32(iou_threshold),
            np.float32(nms != "soft"),
            np.int32(stop),
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
        rows = _take(rows, rank_rows(group, scores_out))
    if nms != "nms":
        rows = _decay(rows, sigma)
    if nms == "soft":
        rows = _take(rows, np.flatnonzero(rows.scores > np.float32(min_score)))
    return rows


def _decay(rows: NodeRows, sigma: float) -> NodeRows:
    """Gaussian soft-NMS that drops nothing; the rows come back in order of the new scores."""
    n = len(rows.scores)
    columns = np.concatenate([rows.columns, np.zeros((4, 1), np.float32)], axis=1)
    scores = np.append(rows.scores, np.float32(0))
    starts, sizes = _runs(rows.group)
    for places, _ in _blocks(starts, sizes, n):
        scores[places] = _soft(
            columns.take(places, axis=1), scores[places], places < n, np.float32(sigma)
        )
    scores = scores[:n]
    return _take(rows._replace(scores=scores), rank_rows(rows.group, scores))


def _runs(group: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return starts, np.diff(starts, append=len(group))


def _blocks(starts: np.ndarray, sizes: np.ndarray, dummy: int):
    """Yields row numbers (N, G) of all groups with two rows or more, and the size of the largest.

    Padding is row `dummy`.
    """
    bucket = np.searchsorted(_SIZES, sizes)
    for index in range(len(_SIZES)):
        chosen = np.flatnonzero((bucket == index) & (sizes > 1))
        if not len(chosen):
            continue
        size = _SIZES[index]
        wide = max(_BLOCK // size // 16 * 16, 16)
        narrow = max(_BLOCK // 4 // size // 16 * 16, 16)
        ranks = np.arange(size)[:, None]
        first = 0
        while first < len(chosen):
            width = wide if len(chosen) - first > narrow else narrow
            part = chosen[first : first + width]
            places = np.full((size, width), dummy)
            places[:, : len(part)] = np.where(ranks < sizes[part], starts[part] + ranks, dummy)
            yield places, sizes[part].max()
            first += width


def _take(rows: NodeRows, index: np.ndarray) -> NodeRows:
    return NodeRows(
        rows.group[index],
        rows.scores[index],
        rows.columns[:, index],
        rows.source[index],
        rows.moved[index],
    )


@jax.jit
def _match(
    boxes: GroupBoxes,
    side: Float[Array, "N G"],
    enters: GroupMask,
    iou_threshold: Float[Array, ""],
    hard: Float[Array, ""],
    stop: Int[Array, ""],
) -> tuple[GroupMask, Int32[Array, "N G"]]:
    """Greedy NMS of the entering rows, and each row's partner on the other side (-1: none).

    Args:
      boxes: by falling score.
      side: which child a row is of.
      enters: rows that may be kept.
      iou_threshold: of NMS and for partners, exceeded strictly.
      hard: 1; 0 keeps all rows that enter.
      stop: end of the places in use.
    """
    at = kernels.positions(boxes)

    def visit(i, now, state):
        (box, own), leads = now
        alive, best, partner = state
        overlap = kernels.overlaps(box, boxes)
        hit = (overlap * leads * hard > iou_threshold) & (at > i)
        better = (overlap > best) & (side != own)
        return (
            jnp.where(hit, 0.0, alive),
            jnp.where(better, overlap, best),
            jnp.where(better, i, partner),
        )

    state = (
        enters.astype(boxes.dtype),
        jnp.full(side.shape, iou_threshold),
        jnp.full(side.shape, -1, jnp.int32),
    )
    alive, _, partner = kernels.walk(
        (boxes, side), visit, state, stop=stop, watch=lambda state: state[0]
    )
    return alive > 0, partner


@jax.jit
def _soft(
    boxes: GroupBoxes, scores: GroupScores, valid: GroupMask, sigma: Float[Array, ""]
) -> GroupScores:
    """Gaussian soft-NMS."""
    return kernels.decay(boxes, scores, valid, kernels.gaussian(sigma))
