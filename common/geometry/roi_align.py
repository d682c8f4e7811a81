"""RoIAlign over a feature pyramid, in three forms that give the same numbers.

Each output bin is the mean of `sampling_ratio` x `sampling_ratio` bilinear samples. A bilinear
weight is the product of a row and a column factor, the hat function max(0, 1 - |g - i|) of sample
position g and cell i; so is the mean over the samples of a bin.

  einsum  two dense contractions with the weights of whole rows and columns, for TPU's matrix units;
          nothing is scattered in backward
  gather  reads the cells around each sample; backward is one scatter-add per corner, for GPU
  tiles   forward as gather; backward walks over the RoIs and adds small dense tiles to the feature
          gradient, for CPU, where XLA scatters one cell at a time

Shape legend:
  B: images   R: RoIs per image   L: pyramid levels   H, W: feature height, width   C: channels
  S: output_size   Q: samples along each axis of a bin (sampling_ratio)
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from common.geometry import boxes as box_ops

METHODS = ("einsum", "gather", "tiles")
_TILE = 8  # cells; 4 to 16 measure alike on CPU, 32 slower


def assign_levels(
    boxes: Float[Array, "... 4"],
    min_level: int = 2,
    max_level: int = 5,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Int[Array, "..."]:
    """Returns the pyramid level of each box, floor(4 + log2(sqrt(area) / 224)) clamped (FPN eq. 1).

    Args:
      boxes: pixels of the input canvas.
      min_level: finest level (stride 2**min_level).
      max_level: coarsest level.
      canonical_size: side of the box, pixels, that goes to `canonical_level`.
      canonical_level: see above.
    """
    size = jnp.sqrt(box_ops.area(boxes))
    # The offset keeps sizes of exactly 224 times a power of two above the floor.
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

    A sample outside [-1, size] of the feature map counts as zero, any other is clamped to the map,
    as in torchvision. Differentiable once, in reverse mode, with respect to the features.

    Args:
      features: one map per level, finest first.
      boxes: pixels of the input canvas. They get no gradient.
      strides: input pixels per feature cell, of each level; consecutive powers of two.
      output_size: S.
      sampling_ratio: samples along each axis of a bin, at least 1.
      aligned: True puts the centre of cell i at i + 0.5 (half-pixel correct). False is the older
        convention: no shift, and RoIs at least one cell in size.
      method: one of METHODS; None takes what suits the platform that the program is compiled for.

    Raises:
      ValueError: an unknown method, or strides or sampling_ratio that make no pyramid.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"RoIAlign method {method!r}, expected one of {METHODS} or None")
    levels, start, size = locate_windows(features, boxes, strides, aligned)
    steps = sample_steps(output_size, sampling_ratio)
    points = start[..., None, None] + size[..., None, None] * steps
    sizes = tuple(feature.shape[1:3] for feature in features)
    return _align(
        method, sizes, tuple(features), levels, points[..., 1, :, :], points[..., 0, :, :]
    )


def locate_windows(
    features: Sequence[Float[Array, "B H W C"]],
    boxes: Float[Array, "B R 4"],
    strides: Sequence[int],
    aligned: bool,
) -> tuple[Int[Array, "B R"], Float[Array, "B R 2"], Float[Array, "B R 2"]]:
    """Returns the index of each RoI's feature map, and its corner (x, y) and size (x, y) in cells.

    Arguments and errors as of `roi_align`; no gradient to the boxes.
    """
    if len(features) != len(strides):
        raise ValueError(f"{len(features)} feature maps but {len(strides)} strides")
    if any(stride != strides[0] << level for level, stride in enumerate(strides)):
        raise ValueError(f"strides {tuple(strides)}, expected each twice the one before")
    boxes = lax.stop_gradient(boxes.astype(jnp.float32))
    min_level = round(math.log2(strides[0]))
    levels = assign_levels(boxes, min_level, min_level + len(strides) - 1) - min_level
    scale = 1.0 / jnp.asarray(strides, jnp.float32)[levels]
    boxes = boxes * scale[..., None] - (0.5 if aligned else 0.0)
    start, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    return levels, start, size if aligned else jnp.maximum(size, 1.0)


def sample_steps(
    output_size: int, sampling_ratio: int, position: float = 0.5
) -> Float[Array, "S Q"]:
    """Returns where the samples of each bin lie, as shares of the window; `position`: in theirs."""
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio {sampling_ratio}, expected at least 1")
    sample = (jnp.arange(sampling_ratio) + position) / sampling_ratio
    return (jnp.arange(output_size)[:, None] + sample) / output_size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _align(method, sizes, features, levels, y, x):
    forward = {"einsum": _einsum, "gather": _gather, "tiles": _gather_in_turns}
    return _dispatch(method, {name: forward[name] for name in METHODS}, features, levels, y, x)


def _align_forward(method, sizes, features, levels, y, x):
    return _align(method, sizes, features, levels, y, x), (levels, y, x)


def _align_backward(method, sizes, residuals, gradient):
    backward = {"einsum": _einsum_backward, "gather": _gather_backward, "tiles": _tiles_backward}
    backward = {name: functools.partial(backward[name], sizes) for name in METHODS}
    return _dispatch(method, backward, jnp.asarray(gradient), *residuals), None, None, None


_align.defvjp(_align_forward, _align_backward)


def _dispatch(method, functions, *arguments):
    """Calls the function of the method, or the one that suits the platform of the lowering."""
    if method is not None:
        return functions[method](*arguments)
    return lax.platform_dependent(
        *arguments, tpu=functions["einsum"], cpu=functions["tiles"], default=functions["gather"]
    )


def hat_weights(points, size, cells):
    """Returns weights (..., S, T) of the cells (T,), means over the points (..., S, Q)."""
    inside = (points >= -1.0) & (points <= size)
    points = jnp.clip(points, 0.0, size - 1.0)
    weights = jnp.maximum(1.0 - jnp.abs(points[..., None] - cells), 0.0)
    return jnp.mean(jnp.where(inside[..., None], weights, 0.0), axis=-2)


def _einsum(features, levels, y, x):
    output = 0.0
    for level, feature in enumerate(features):
        height, width = feature.shape[1:3]
        rows = hat_weights(y, height, jnp.arange(height))
        rows = jnp.where((levels == level)[..., None, None], rows, 0.0).astype(feature.dtype)
        columns = hat_weights(x, width, jnp.arange(width)).astype(feature.dtype)
        crops = jnp.einsum("brsh,bhwc->brswc", rows, feature)
        # All terms of this sum but one are zero: exact in any precision.
        output += jnp.einsum("brtw,brswc->brstc", columns, crops)
    return output


def _einsum_backward(sizes, gradient, levels, y, x):
    batch, channels = gradient.shape[0], gradient.shape[-1]
    features = tuple(
        jax.ShapeDtypeStruct((batch, *size, channels), gradient.dtype) for size in sizes
    )
    transpose = jax.linear_transpose(lambda maps: _einsum(maps, levels, y, x), features)
    return transpose(gradient)[0]


def _corner_terms(sizes, levels, y, x):
    """Returns the (2Q)^2 terms of a bin: pairs of cell index and weight, each (B, R, S, S).

    The index counts cells of all levels of one image, level after level, row by row.
    """
    areas = [height * width for height, width in sizes]
    first = jnp.array([sum(areas[:level]) for level in range(len(sizes))])[levels]
    size = jnp.array(sizes)[levels]
    rows, row_weights = _corners(y, size[..., 0, None, None])
    columns, column_weights = _corners(x, size[..., 1, None, None])
    rows = rows * size[..., 1, None, None] + first[..., None, None]
    terms = []
    for i in range(rows.shape[-1]):
        for j in range(columns.shape[-1]):
            index = rows[..., :, None, i] + columns[..., None, :, j]
            terms.append((index, row_weights[..., :, None, i] * column_weights[..., None, :, j]))
    return terms


def _corners(points, size):
    """Returns cells (..., S, 2Q) next to the points (..., S, Q), and their share of the bin."""
    inside = (points >= -1.0) & (points <= size)
    points = jnp.clip(points, 0.0, size - 1.0)
    low = jnp.floor(points)
    fraction = points - low
    share = inside / points.shape[-1]
    low = low.astype(jnp.int32)
    cells = jnp.concatenate([low, jnp.minimum(low + 1, size - 1)], axis=-1)
    return cells, jnp.concatenate([(1.0 - fraction) * share, fraction * share], axis=-1)


def _gather(features, levels, y, x):
    batch, channels = features[0].shape[0], features[0].shape[-1]
    sizes = tuple(feature.shape[1:3] for feature in features)
    flat = jnp.concatenate([f.reshape(batch, -1, channels) for f in features], axis=1)
    read = jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds"))
    output = 0.0
    # One addend per corner keeps channels innermost in XLA's loop, which vectorises it on CPU:
    # 4x faster than one gather of all corners and a sum over them.
    for index, weight in _corner_terms(sizes, levels, y, x):
        output += weight[..., None] * read(flat, index).astype(jnp.float32)
    return output.astype(flat.dtype)


def _gather_in_turns(features, levels, y, x):
    """`_gather`, image after image (one image: half after half of its RoIs).

    The loop keeps the flattening that a dense layer begins with out of XLA:CPU's fused gather.
    Fused into it, channels are no longer the innermost index and the gather takes 10 times as long.
    """
    batch, num_rois = levels.shape
    if batch != 1:  # also of an unknown number of images, in exported programs
        return lax.map(
            lambda image: _gather(*jax.tree.map(lambda a: a[None], image))[0],
            (features, levels, y, x),
        )
    half = -(-num_rois // 2)

    def halves(a):
        a = jnp.pad(a[0], ((0, 2 * half - num_rois), *((0, 0) for _ in a.shape[2:])))
        return a.reshape(2, 1, half, *a.shape[1:])

    pooled = lax.map(lambda part: _gather(features, *part)[0], tuple(map(halves, (levels, y, x))))
    return pooled.reshape(1, 2 * half, *pooled.shape[2:])[:, :num_rois]


def _gather_backward(sizes, gradient, levels, y, x):
    batch, channels = gradient.shape[0], gradient.shape[-1]
    areas = [height * width for height, width in sizes]
    flat = jnp.zeros((batch, sum(areas), channels), jnp.float32)
    add = jax.vmap(lambda table, i, update: table.at[i].add(update, mode="promise_in_bounds"))
    for index, weight in _corner_terms(sizes, levels, y, x):
        flat = add(flat, index, weight[..., None] * gradient.astype(jnp.float32))
    ends = [sum(areas[: level + 1]) for level in range(len(areas) - 1)]
    parts = jnp.split(flat.astype(gradient.dtype), ends, axis=1)
    return tuple(
        part.reshape(batch, *size, channels) for part, size in zip(parts, sizes, strict=True)
    )


def _tiles_backward(sizes, gradient, levels, y, x):
    """The feature gradient, RoI after RoI: rows(S, T)^T . gradient(S, S, C) . columns(S, T)."""
    batch, num_rois, bins, _, channels = gradient.shape
    order = jnp.argsort(levels.reshape(-1), stable=True)
    ends = jnp.cumsum(jnp.bincount(levels.reshape(-1), length=len(sizes)))
    starts = jnp.concatenate([jnp.zeros((1,), ends.dtype), ends[:-1]])
    outputs = []
    for level, (height, width) in enumerate(sizes):
        tile_height, tile_width = min(_TILE, height), min(_TILE, width)

        def add_roi(slot, total, height=height, width=width, th=tile_height, tw=tile_width):
            image, roi = order[slot] // num_rois, order[slot] % num_rois
            ys, xs, roi_gradient = y[image, roi], x[image, roi], gradient[image, roi]
            top, bottom = _extent(ys, height)
            left, right = _extent(xs, width)

            def add_column(j, total):
                weights, column = _tile_weights(xs, width, left + j * tw, tw)
                # Sums written out: elementwise loops over channels beat a small matmul here.
                strip = sum(
                    weights[t, None, :, None] * roi_gradient[:, t, None, :].astype(jnp.float32)
                    for t in range(bins)
                )
                # Without the barriers XLA recomputes strip and weights for every element of a tile.
                strip = lax.optimization_barrier(strip)

                def add_tile(i, total):
                    weights, row = _tile_weights(ys, height, top + i * th, th)
                    weights = lax.optimization_barrier(weights)
                    tile = sum(weights[s, :, None, None] * strip[s] for s in range(bins))
                    corner = (image, row, column, 0)
                    old = lax.dynamic_slice(total, corner, (1, th, tw, channels))
                    return lax.dynamic_update_slice(total, old + tile[None], corner)

                return lax.fori_loop(0, (bottom - top) // th + 1, add_tile, total)

            return lax.fori_loop(0, (right - left) // tw + 1, add_column, total)

        total = jnp.zeros((batch, height, width, channels), jnp.float32)
        total = lax.fori_loop(starts[level], ends[level], add_roi, total)
        outputs.append(total.astype(gradient.dtype))
    return tuple(outputs)


def _extent(points, size):
    """Returns the first and the last cell that the points of one RoI and axis touch."""
    points = jnp.clip(points, 0.0, size - 1.0)
    low = jnp.floor(jnp.min(points)).astype(jnp.int32)
    high = jnp.floor(jnp.max(points)).astype(jnp.int32) + 1
    # Clamped as integers, so that a NaN box cannot make the loops endless.
    return jnp.clip(low, 0, size - 1), jnp.clip(high, 0, size - 1)


def _tile_weights(points, size, first, tile):
    """Returns weights (S, tile) from cell `first` on, and where that tile begins on the map.

    A tile that would leave the map begins earlier; the cells before `first` weigh nothing.
    """
    begin = jnp.minimum(first, size - tile)
    cells = begin + jnp.arange(tile)
    return jnp.where(cells >= first, hat_weights(points, size, cells), 0.0), begin
