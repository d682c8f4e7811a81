"""RoIAlign over a feature pyramid, in forms that give the same numbers and suit different devices.

Each output bin is the mean of `sampling_ratio` x `sampling_ratio` bilinear samples. Bilinear weights are products of a
row and a column factor, the hat function max(0, 1 - |g - i|) of sample position g and cell i, and so is their mean.

Shape legend:
  B: images   R: RoIs per image   L: pyramid levels   H, W: feature height, width   C: channels   S: output_size
  P: sampling points along one axis of a RoI (S * sampling_ratio)
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from common import boxes as box_ops


def assign_levels(
    boxes: Float[Array, "... 4"],
    min_level: int = 2,
    max_level: int = 5,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Int[Array, "..."]:
    """Returns the pyramid level of each box, floor(4 + log2(sqrt(area) / 224)) clamped (FPN, eq. 1).

    Args:
      boxes: pixels of the input canvas.
      min_level: finest level (stride 2**min_level).
      max_level: coarsest level.
      canonical_size: side of the box, pixels, that goes to `canonical_level`.
      canonical_level: see above.
    """
    size = jnp.sqrt(box_ops.area(boxes))
    # The offset keeps sizes of exactly a power of two times 224 on the upper side of the floor.
    level = jnp.floor(canonical_level + jnp.log2(size / canonical_size) + 1e-6)
    return jnp.clip(level, min_level, max_level).astype(jnp.int32)


def roi_align(
    features: Sequence[Float[Array, "B H W C"]],
    boxes: Float[Array, "B R 4"],
    strides: Sequence[int],
    *,
    output_size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = True,
    method: str | None = None,
) -> Float[Array, "B R S S C"]:
    """Crops every RoI from its pyramid level into S x S bins (Mask R-CNN, section 3).

    A sample outside [-1, size] of the feature map counts as zero, one inside is clamped to the map.

    Args:
      features: one map per level, finest first.
      boxes: pixels of the input canvas. They get no gradient.
      strides: input pixels per feature cell, of each level; consecutive powers of two.
      output_size: S.
      sampling_ratio: samples along each axis of a bin.
      aligned: True puts the centre of cell i at i + 0.5 (half-pixel correct). False is the older convention: no shift,
        and RoIs at least one cell in size.
      method: 'einsum' or 'gather'; None takes what suits the platform that the program is compiled for.
    """
    if method is None:
        run = functools.partial(
            lax.platform_dependent,
            tpu=functools.partial(_METHODS["einsum"]),
            default=functools.partial(_METHODS["gather"]),
        )
    elif method in _METHODS:
        run = _METHODS[method]
    else:
        raise ValueError(f"RoIAlign method {method!r}, expected one of {sorted(_METHODS)}")
    if len(features) != len(strides):
        raise ValueError(f"{len(features)} feature maps but {len(strides)} strides")
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio {sampling_ratio}, expected at least 1")
    boxes = lax.stop_gradient(boxes.astype(jnp.float32))
    min_level = round(math.log2(strides[0]))
    levels = assign_levels(boxes, min_level, min_level + len(strides) - 1) - min_level
    scale = 1.0 / jnp.asarray(strides, jnp.float32)[levels]
    points = _sample_points(boxes, scale, output_size, sampling_ratio, aligned)
    return run(tuple(features), levels, *points)


def _sample_points(boxes, scale, output_size, sampling_ratio, aligned):
    """Returns y and x of the sampling points, each (B, R, S, sampling_ratio), in cells."""
    boxes = boxes * scale[..., None] - (0.5 if aligned else 0.0)
    start, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    if not aligned:
        size = jnp.maximum(size, 1.0)
    steps = (
        jnp.arange(output_size)[:, None] + (jnp.arange(sampling_ratio) + 0.5) / sampling_ratio
    ) / output_size
    points = start[..., None, None] + size[..., None, None] * steps
    return points[..., 1, :, :], points[..., 0, :, :]


def _axis_weights(points, size):
    """Returns the mean hat weights (B, R, S, size) of the samples of each bin."""
    inside = (points >= -1.0) & (points <= size)
    points = jnp.clip(points, 0.0, size - 1.0)[..., None]
    weights = jnp.maximum(1.0 - jnp.abs(points - jnp.arange(size)), 0.0)
    return jnp.mean(jnp.where(inside[..., None], weights, 0.0), axis=-2)


def _einsum(features, levels, y, x):
    """Two dense contractions per level: matrix units do the work, nothing is scattered in backward."""
    output = 0.0
    for level, feature in enumerate(features):
        on_level = (levels == level)[..., None, None]
        rows = _axis_weights(y, feature.shape[1]) * on_level
        columns = _axis_weights(x, feature.shape[2])
        crops = jnp.einsum("brsh,bhwc->brswc", rows.astype(feature.dtype), feature)
        output += jnp.einsum("brtw,brswc->brstc", columns.astype(feature.dtype), crops)
    return output


def _gather(features, levels, y, x):
    """Reads the four corners of every sample from the concatenated levels."""
    batch, _, _, channels = features[0].shape
    sizes = [feature.shape[1:3] for feature in features]
    offsets = [0]
    for height, width in sizes[:-1]:
        offsets.append(offsets[-1] + height * width)
    flat = jnp.concatenate([f.reshape(batch, -1, channels) for f in features], axis=1)
    height, width = (jnp.array(s)[levels][..., None, None] for s in zip(*sizes, strict=True))
    offset = jnp.array(offsets)[levels][..., None, None, None, None]
    rows = _corners(y, height)
    columns = _corners(x, width)
    output = 0.0
    for row, row_weight in rows:
        for column, column_weight in columns:
            index = (
                offset
                + row[..., :, None, :, None] * width[..., None, None]
                + column[..., None, :, None, :]
            )
            weight = row_weight[..., :, None, :, None] * column_weight[..., None, :, None, :]
            values = jax.vmap(lambda table, i: table[i])(flat, index)
            output += jnp.sum(values * weight[..., None].astype(values.dtype), axis=(4, 5))
    return output


def _corners(points, size):
    """Returns ((index, weight), (index, weight)) of the two cells around each point, weights over samples."""
    inside = (points >= -1.0) & (points <= size)
    points = jnp.clip(points, 0.0, size - 1.0)
    low = jnp.floor(points)
    fraction = points - low
    share = inside / points.shape[-1]
    low = low.astype(jnp.int32)
    return (low, (1.0 - fraction) * share), (jnp.minimum(low + 1, size - 1), fraction * share)


_METHODS = {"einsum": _einsum, "gather": _gather}
