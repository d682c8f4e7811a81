"""Box arithmetic: areas, overlaps, regression targets.

Boxes are `xmin, ymin, xmax, ymax`, float32, continuous and half-open (from 0 to 10 is 10 wide), in
any unit that all arguments share. Boxes with a side that is not positive have zero area and
overlap nothing.

Shape legend:
  ...: any leading dimensions, broadcast between arguments
  N, M: number of boxes
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

AnyArray = TypeVar("AnyArray", Array, np.ndarray)

# The largest log size ratio that a delta may ask for (Faster R-CNN: 1000 pixels from a 16-pixel
# anchor).
MAX_LOG_RATIO = math.log(1000.0 / 16.0)


def sides(boxes: Float[Array, "... 4"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns width and height, clamped at zero."""
    width = jnp.maximum(boxes[..., 2] - boxes[..., 0], 0.0)
    height = jnp.maximum(boxes[..., 3] - boxes[..., 1], 0.0)
    return width, height


def area(boxes: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns the areas; zero for boxes with a side that is not positive."""
    width, height = sides(boxes)
    return width * height


def is_valid(boxes: Float[Array, "... 4"]) -> Bool[Array, "..."]:
    """True where both sides are strictly positive."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def per_side(height_width: AnyArray) -> AnyArray:
    """Width, height, width, height (..., 4): what the sides of normalised boxes are multiplied by.

    Padded images have size 0, for which 1 stands, so that their boxes can be divided too.
    """
    return height_width.clip(1)[..., np.array([1, 0, 1, 0])]


def clip(
    boxes: Float[Array, "... N 4"], height_width: Float[Array, "... 2"]
) -> Float[Array, "... N 4"]:
    """Clips boxes to an image that spans [0, width] x [0, height].

    Args:
      boxes: boxes in the unit of `height_width`.
      height_width: height, width of each image; leading dimensions as in `boxes`, without N.
    """
    height_width = jnp.asarray(height_width, boxes.dtype)
    limits = height_width[..., None, jnp.array([1, 0, 1, 0])]
    return jnp.clip(boxes, 0.0, limits)


def intersection(a: Float[Array, "... N 4"], b: Float[Array, "... M 4"]) -> Float[Array, "... N M"]:
    """Returns the areas that every box of `a` shares with every box of `b`."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    return jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)


def iou(a: Float[Array, "... N 4"], b: Float[Array, "... M 4"]) -> Float[Array, "... N M"]:
    """Returns intersection over union; zero where the union is empty."""
    shared = intersection(a, b)
    return _safe_divide(shared, area(a)[..., :, None] + area(b)[..., None, :] - shared)


def paired_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """`iou` of boxes side by side, in NumPy."""
    shared = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.maximum(shared, 0).prod(axis=1)
    union = sum(np.maximum(box[:, 2:] - box[:, :2], 0).prod(axis=1) for box in (a, b)) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def ioa(a: Float[Array, "... N 4"], b: Float[Array, "... M 4"]) -> Float[Array, "... N M"]:
    """Returns intersection over the area of `a`'s box; zero where that area is zero."""
    return _safe_divide(intersection(a, b), area(a)[..., :, None])


def encode(
    boxes: Float[Array, "... 4"],
    references: Float[Array, "... 4"],
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "... 4"]:
    """Returns the regression targets that turn `references` into `boxes` (Faster R-CNN, eq. 2).

    Args:
      boxes: target boxes.
      references: anchors or proposals, one for each target.
      stds: the deltas are divided by these.

    Returns:
      dx, dy (centre shift in units of the reference's sides), dw, dh (log ratio of sides), each
      over its std. All zero where either box has no area, so that padded rows stay finite.
    """
    usable = is_valid(boxes) & is_valid(references)
    unit = jnp.array([0.0, 0.0, 1.0, 1.0], boxes.dtype)
    boxes = jnp.where(usable[..., None], boxes, unit)
    references = jnp.where(usable[..., None], references, unit)
    box_size, box_centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., 2:] + boxes[..., :2]) * 0.5
    size, centre = (
        references[..., 2:] - references[..., :2],
        (references[..., 2:] + references[..., :2]) * 0.5,
    )
    deltas = jnp.concatenate([(box_centre - centre) / size, jnp.log(box_size / size)], axis=-1)
    return deltas / jnp.asarray(stds, deltas.dtype)


def decode(
    deltas: Float[Array, "... 4"],
    references: Float[Array, "... 4"],
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Float[Array, "... 4"]:
    """Applies regression deltas to references; the inverse of `encode`.

    Args:
      deltas: dx, dy, dw, dh in units of `stds`.
      references: anchors or proposals; broadcasts against `deltas`.
      stds: the deltas are multiplied by these.
      max_log_ratio: dw and dh are clamped from above, so that an untrained head cannot overflow.
    """
    deltas = deltas * jnp.asarray(stds, deltas.dtype)
    size = references[..., 2:] - references[..., :2]
    centre = (references[..., :2] + references[..., 2:]) * 0.5 + deltas[..., :2] * size
    half = size * jnp.exp(jnp.minimum(deltas[..., 2:], max_log_ratio)) * 0.5
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def _safe_divide(
    numerator: Float[Array, "..."], denominator: Float[Array, "..."]
) -> Float[Array, "..."]:
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
