"""Exact non-maximum suppression with fixed shapes.

Greedy NMS visits the boxes by falling score and keeps a box unless it overlaps an already kept one
of its class by more than the threshold. Here the boxes are sorted by (class, score) and cut into
tiles. A tile is first compared with the kept boxes of those earlier tiles that hold its first
class, then with itself: `keep <- alive & not any(suppressors that are kept)` until nothing changes.
The fix point is unique and equals the greedy result (induction over the rank), and a handful of
rounds reach it. So boxes of different classes meet only inside a tile or at its borders, where a
mask separates them; shifting each class to coordinates of its own would cost float32 resolution.

`ensemble.operators.kernels` has greedy NMS in another form, for groups of one class of one image,
a few sorted boxes each: a loop over the ranks that visits thousands of groups side by side.

Shape legend:
  N: boxes   R: proposals   K: classes (1 when shared)   T: tile
  M: max_candidates   D: max_detections or max_outputs
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops

_TILE = 64
# Each turn of a loop launches kernels and lets the host read its condition: few, wide turns there.
_GPU_TILE = 1024


def nms_mask(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    valid: Bool[Array, " N"],
    iou_threshold: float,
    classes: Int[Array, " N"] | None = None,
    *,
    tile: int | None = None,
) -> Bool[Array, " N"]:
    """Greedy NMS, exact, for entries in any order.

    Args:
      boxes: any unit.
      scores: higher wins; of equal scores the lower index wins.
      valid: entries that take part.
      iou_threshold: a kept box suppresses later ones whose IoU with it is greater, compared in
        float32. A zero-area box neither suppresses nor is suppressed.
      classes: boxes of different classes do not see one another; None means one class.
      tile: boxes that are looked at side by side; None takes what suits the platform that the
        program is compiled for. The result does not depend on it.

    Returns:
      True for the kept entries, in the order of the input.
    """
    if boxes.shape[0] == 0:
        return jnp.zeros((0,), bool)
    if classes is None:
        classes = jnp.zeros(boxes.shape[:1], jnp.int32)
    arrays = boxes.astype(jnp.float32), scores, valid, classes

    def with_tile(tile, *arrays):
        return _nms_mask(*arrays, iou_threshold, min(tile, boxes.shape[0]))

    if tile is not None or boxes.shape[0] <= _TILE:
        return with_tile(tile or _TILE, *arrays)
    small = functools.partial(with_tile, _TILE)
    wide = functools.partial(with_tile, _GPU_TILE)
    return lax.platform_dependent(*arrays, cpu=small, tpu=small, default=wide)


def _nms_mask(boxes, scores, valid, classes, iou_threshold, tile):
    n = boxes.shape[0]
    num_tiles = -(-n // tile)
    pad = num_tiles * tile - n
    # Invalid entries go behind all others whatever their class.
    _, groups, _, order = lax.sort(
        (~valid, classes.astype(jnp.int32), -scores.astype(jnp.float32), jnp.arange(n)), num_keys=3
    )
    sorted_boxes = jnp.pad(boxes[order], ((0, pad), (0, 0)))
    groups = jnp.pad(groups, (0, pad), mode="edge")
    alive = jnp.pad(valid[order], (0, pad))

    position = jnp.arange(num_tiles * tile)
    changes = jnp.concatenate([jnp.ones((1,), bool), groups[1:] != groups[:-1]])
    first_of_group = lax.cummax(jnp.where(changes, position, 0))
    first_tile = first_of_group[::tile] // tile
    # Tiles of invalid entries need no look back.
    first_tile = jnp.where(alive[::tile], first_tile, position[::tile] // tile)
    earlier = jnp.arange(tile)[:, None] < jnp.arange(tile)[None, :]

    def slice_tile(array, t):
        return lax.dynamic_slice_in_dim(array, t * tile, tile)

    def suppresses(t, u):
        """(T, T): box i of tile t overlaps box j of tile u and shares its class."""
        overlap = (
            box_ops.iou(slice_tile(sorted_boxes, t), slice_tile(sorted_boxes, u)) > iou_threshold
        )
        return overlap & (slice_tile(groups, t)[:, None] == slice_tile(groups, u)[None, :])

    def visit(t, keep):
        def look_back(s, alive):
            return alive & ~jnp.any(suppresses(s, t) & slice_tile(keep, s)[:, None], axis=0)

        alive = lax.fori_loop(first_tile[t], t, look_back, slice_tile(keep, t))
        inside = suppresses(t, t) & earlier

        def refine(state):
            kept, _ = state
            refined = alive & ~jnp.any(inside & kept[:, None], axis=0)
            return refined, jnp.any(refined != kept)

        kept, _ = lax.while_loop(lambda state: state[1], refine, (alive, jnp.array(True)))
        return lax.dynamic_update_slice_in_dim(keep, kept, t * tile, 0)

    keep = lax.fori_loop(0, num_tiles, visit, alive)[:n]
    return jnp.zeros((n,), bool).at[order].set(keep, unique_indices=True)


def nms_top(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    valid: Bool[Array, " N"],
    iou_threshold: float,
    max_outputs: int,
    classes: Int[Array, " N"] | None = None,
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """Returns indices of the best kept entries by falling score, and which of them are real.

    Arguments as in `nms_mask`. Rows beyond the kept entries hold index 0 and False.
    """
    n = boxes.shape[0]
    keep = nms_mask(boxes, scores, valid, iou_threshold, classes)
    top, indices = _top_masked(scores, keep, min(max_outputs, n))
    indices = jnp.pad(jnp.where(top, indices, 0), (0, max(max_outputs - n, 0)))
    return indices.astype(jnp.int32), jnp.pad(top, (0, max(max_outputs - n, 0)))


def multiclass_nms(
    boxes: Float[Array, "R K 4"],
    scores: Float[Array, "R K"],
    valid: Bool[Array, " R"],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> dict[str, Array]:
    """Detections of one image: score threshold, NMS in each class, the best over all classes.

    The `max_candidates` best (proposal, class) pairs above the score threshold enter NMS. A pair
    that is left out scores no higher than any candidate, so it could not have suppressed one.
    Hence the result is exactly that of NMS over all pairs whenever at most `max_candidates` pairs
    pass the threshold, or all `max_detections` outputs are valid.

    Args:
      boxes: (R, K, 4), or (R, 1, 4) when all classes share a proposal's box.
      scores: probability of each class (no background column).
      valid: real proposals.
      score_threshold: pairs must score higher than this.
      iou_threshold: as in `nms_mask`.
      max_candidates: M, static; pairs that enter NMS.
      max_detections: D, static; rows of the result.

    Returns:
      boxes (D, 4), scores (D,), classes (D,) int32 in 0..K-1, valid (D,), by falling score;
      zeros where not valid.
    """
    num_proposals, num_classes = scores.shape
    passes = (scores > score_threshold) & valid[:, None]
    passes, flat = _top_masked(
        scores.reshape(-1), passes.reshape(-1), min(max_candidates, num_proposals * num_classes)
    )
    proposals, classes = flat // num_classes, flat % num_classes
    columns = classes if boxes.shape[1] > 1 else jnp.zeros_like(classes)
    candidates = boxes[proposals, columns]
    candidate_scores = scores[proposals, classes]
    indices, kept = nms_top(
        candidates, candidate_scores, passes, iou_threshold, max_detections, classes
    )
    return {
        "boxes": jnp.where(kept[:, None], candidates[indices], 0.0),
        "scores": jnp.where(kept, candidate_scores[indices], 0.0),
        "classes": jnp.where(kept, classes[indices], 0).astype(jnp.int32),
        "valid": kept,
    }


def _top_masked(
    scores: Float[Array, " N"], mask: Bool[Array, " N"], k: int
) -> tuple[Bool[Array, " k"], Int[Array, " k"]]:
    """Returns (is real, index) of the k best entries under the mask; equal scores by index."""
    lowest = jnp.finfo(scores.dtype).min
    _, indices = lax.top_k(jnp.where(mask, jnp.maximum(scores, lowest), -jnp.inf), k)
    return mask[indices], indices
