"""Which proposals stand for the objects that an image is known to show: mined boxes and seeds.

Shape legend
  P  proposals of one image
  K  classes
  S  seeds of one image

Functions are per image, and models map them over the batch with `jax.vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.geometry import boxes as box_ops
from common.geometry.nms import nms_mask
from detection.models.weak_settings import MiningSettings


class Seeds(NamedTuple):
    """Boxes of one image (or of a batch), highest score first; padded."""

    boxes: Float[Array, "S 4"]
    classes: Int[Array, " S"]
    scores: Float[Array, " S"]
    valid: Bool[Array, " S"]


def top_seeds(
    scores: Float[Array, "P K"],
    boxes: Float[Array, "P 4"],
    valid: Bool[Array, " P"],
    present: Bool[Array, " K"],
    max_seeds: int,
    threshold: float = 0.0,
) -> Seeds:
    """The best proposal of each present class, if its score is above the threshold.

    A proposal stands for one class (OICR, algorithm 1): the best pair of a class and a proposal is
    taken first, and then neither is there for the others.

    Args:
      scores: of each class.
      boxes: proposals.
      valid: which of them are real.
      present: classes that the image shows.
      max_seeds: S; of more classes those of the highest scores.
      threshold: see above.
    """
    count = min(max_seeds, len(present))
    scores = jnp.where(valid[:, None] & present, scores, -1.0)
    _, classes = jax.lax.top_k(scores.max(axis=0), count)

    def take(left, _):
        row, column = jnp.divmod(left.argmax(), count)
        taken = (jnp.arange(len(left)) == row)[:, None] | (jnp.arange(count) == column)
        return jnp.where(taken, -1.0, left), (row, column, left[row, column])

    _, (rows, columns, top) = jax.lax.scan(take, scores[:, classes], length=count)
    return _padded(boxes[rows], classes[columns], top, top > threshold, max_seeds)


def several_seeds(
    scores: Float[Array, "P K"],
    boxes: Float[Array, "P 4"],
    valid: Bool[Array, " P"],
    present: Bool[Array, " K"],
    max_seeds: int,
    threshold: float,
    top_share: float,
    seed_iou: float,
) -> Seeds:
    """Several proposals of each present class (MIST, Ren et al. 2020, algorithm 1).

    Of the share `top_share` of the valid proposals with the highest scores of a class, those that
    do not overlap a better one by more than `seed_iou`. Of more than `max_seeds` classes those of
    the highest scores are looked at, and of more seeds the best are kept.

    Args: as `top_seeds`, and see above.
    """
    num_classes, count = min(max_seeds, len(present)), _share_of(len(valid), top_share)
    scores = jnp.where(valid[:, None], scores, -1.0)
    _, classes = jax.lax.top_k(jnp.where(present, scores.max(axis=0), -1.0), num_classes)
    top, index = jax.lax.top_k(scores[:, classes].T, count)
    looked_at = jnp.arange(count) < _share_of(valid.sum(), top_share)
    candidates = looked_at & (top > threshold) & present[classes][:, None]
    keep = jax.vmap(nms_mask, (0, 0, 0, None))(boxes[index], top, candidates, seed_iou)
    order = jnp.where(keep, top, -1.0).ravel()
    best, place = jax.lax.top_k(order, min(max_seeds, len(order)))
    found = boxes[index.ravel()[place]]
    return _padded(found, classes[place // count], best, best > threshold, max_seeds)


def mined_boxes(
    scores: Float[Array, "P K"],
    boxes: Float[Array, "P 4"],
    valid: Bool[Array, " P"],
    present: Bool[Array, " K"],
    settings: MiningSettings,
) -> Seeds:
    """Boxes to be taken for the truth of an image, by `config.model.weak.mining`."""
    fixed = scores, boxes, valid, present, settings.max_boxes, settings.threshold
    if settings.rule == "mist":
        return several_seeds(*fixed, settings.top_share, settings.seed_iou)
    return top_seeds(*fixed)


def spread(
    seeds: Seeds, boxes: Float[Array, "P 4"], background_iou: float, positive_iou: float = 0.5
) -> tuple[Int[Array, " P"], Float[Array, " P"]]:
    """Labels and weights of proposals by the seed that each overlaps most (OICR, algorithm 1).

    A proposal that overlaps it by `positive_iou` or more has its class, else it is background; the
    weight is the seed's score, 0 where the overlap is below `background_iou` or there is no seed.

    Returns:
      labels: 0 background, class + 1 otherwise.
      weights: see above.
    """
    overlaps = jnp.where(seeds.valid, box_ops.iou(boxes, seeds.boxes), -1.0)
    nearest, best = overlaps.argmax(axis=1), overlaps.max(axis=1)
    labels = jnp.where(best >= positive_iou, seeds.classes[nearest] + 1, 0)
    return labels, jnp.where(best >= background_iou, seeds.scores[nearest], 0.0)


def _share_of(count, share: float):
    """A share of a number, rounded up, in whole thousandths: no rounding of floats decides."""
    return (count * round(1000 * share) + 999) // 1000


def _padded(boxes, classes, scores, valid, size: int) -> Seeds:
    missing = size - len(valid)
    boxes = jnp.pad(jnp.where(valid[:, None], boxes, 0.0), ((0, missing), (0, 0)))
    classes, scores = (jnp.where(valid, values, 0) for values in (classes, scores))
    rows = (jnp.pad(values, (0, missing)) for values in (classes, scores, valid))
    return Seeds(boxes, *rows)
