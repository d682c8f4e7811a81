"""Bilinear sampling of feature maps at any points, differentiable in the maps and in the points.

A sample is the weighted sum of the 2 x 2 cells around its point. Their values are read as rows of a
table; the feature gradient adds rows to such a table. The table comes in two forms:

  corners  one row per cell, four rows per sample: on CPU and GPU, which read all four in one fused
           loop over channels
  quads    one row per 2 x 2 cells, one row per sample: on TPU, where the number of rows counts.
           Before it adds rows it sorts their numbers, and each such sort takes seconds to compile

Loops go over the images and over the samples of an output, so that the rows of only one sample
exist at a time, and that there is one sort to compile. A batch that is sharded over devices should
come here through `jax.shard_map`, device by device.

Rules at the border:

  zero   cells outside the map are zero (deformable convolution)
  clamp  a point more than a cell outside counts as zero, any other moves to the map (RoIAlign)

The derivative with respect to a point is that of the cell it lies in: at a cell's centre the right
one, zero where the point was moved or does not count.

Shape legend:
  B: images   N: outputs per image   T: samples per output   L: maps   H, W: height, width of a map
  C: channels   Z: rows of an image's table   D: their length, C ('corners') or 4 C ('quads')
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

METHODS = ("corners", "quads")
BORDERS = ("zero", "clamp")
Sizes = tuple[tuple[int, int], ...]  # (H, W) of each map
Four = tuple[Float[Array, " N"], ...]  # one array for each of the four cells, in reading order


def sample_mean(
    maps: Sequence[Float[Array, "B H W C"]],
    levels: Int[Array, "B N"],
    y: Float[Array, "B T N"],
    x: Float[Array, "B T N"],
    *,
    border: str = "zero",
    method: str | None = None,
) -> Float[Array, "B N C"]:
    """Returns the mean of T samples for each output.

    Differentiable once, in reverse mode, with respect to the maps and to `y` and `x`.

    Args:
      maps: of one type, which the result has too; arithmetic is float32.
      levels: which of the maps to sample.
      y, x: points in cells of that map; whole numbers are centres of cells.
      border: one of BORDERS.
      method: one of METHODS; None takes what suits the platform that the program is compiled for.

    Raises:
      ValueError: unknown method or border.
    """
    check_method(method)
    if border not in BORDERS:
        raise ValueError(f"border {border!r}, expected one of {BORDERS}")
    y, x = y.astype(jnp.float32), x.astype(jnp.float32)
    return _sample_mean(method, border, tuple(maps), levels, y, x)


def check_method(method: str | None) -> None:
    """Raises ValueError unless `method` is None or one of METHODS."""
    if method is not None and method not in METHODS:
        raise ValueError(f"sampling method {method!r}, expected one of {METHODS} or None")


def by_platform(method: str | None, function: Callable, *arguments):
    """Calls `function(method, *arguments)`, None being what suits the platform of the lowering."""
    if method is not None:
        return function(method, *arguments)
    return lax.platform_dependent(
        *arguments,
        tpu=functools.partial(function, "quads"),
        default=functools.partial(function, "corners"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sample_mean(method, border, maps, levels, y, x):
    def forward(method, *batch):
        def of_image(image):
            maps, levels, y, x = image
            table = make_table(method, maps)

            def add_sample(total, point):
                place = locate(method, border, _sizes(maps), levels, *point)
                return total + interpolate(place.weights, read(table, place.rows)), None

            total = jnp.zeros((len(levels), maps[0].shape[-1]), jnp.float32)
            total, _ = lax.scan(add_sample, total, (y, x))
            return (total / len(y)).astype(maps[0].dtype)

        return lax.map(of_image, batch)

    return by_platform(method, forward, maps, levels, y, x)


def _sample_mean_forward(method, border, *arrays):
    return _sample_mean(method, border, *arrays), arrays


def _sample_mean_backward(method, border, saved, grad):
    def backward(method, *batch):
        def of_image(image):
            (maps, levels, y, x), grad = image
            table = make_table(method, maps)
            grad = grad.astype(jnp.float32) / len(y)

            def add_sample(total, point):
                place = locate(method, border, _sizes(maps), levels, *point)
                weights_grad = contract(read(table, place.rows), grad)
                point_grad = dot(place.y_slopes, weights_grad), dot(place.x_slopes, weights_grad)
                return add(total, place.rows, place.weights, grad), point_grad

            total = jnp.zeros(table.shape, jnp.float32)
            total, (y_grad, x_grad) = lax.scan(add_sample, total, (y, x))
            maps_grad = fold_table(method, _sizes(maps), total)
            return tuple(grad.astype(table.dtype) for grad in maps_grad), y_grad, x_grad

        return lax.map(of_image, batch)

    maps_grad, y_grad, x_grad = by_platform(method, backward, saved, grad)
    return maps_grad, None, y_grad, x_grad


_sample_mean.defvjp(_sample_mean_forward, _sample_mean_backward)


def _sizes(maps):
    return tuple(feature.shape[:2] for feature in maps)


class Place(NamedTuple):
    """Where one sample of each output lies.

    Attributes:
      rows: of the table, (N,) each: four for 'corners', one for 'quads'.
      weights: of the cells.
      y_slopes, x_slopes: derivatives of the weights with respect to the point.
    """

    rows: tuple[Int[Array, " N"], ...]
    weights: Four
    y_slopes: Four
    x_slopes: Four


def locate(
    method: str,
    border: str,
    sizes: Sizes,
    levels: Int[Array, " N"] | None,
    y: Float[Array, " N"],
    x: Float[Array, " N"],
) -> Place:
    """Rows of the table and weights of the points, on maps of these sizes.

    `levels` says on which map each point lies; None: there is one map.
    """
    margin = 1 if method == "quads" else 0
    areas = [(height + margin) * (width + margin) for height, width in sizes]
    starts = [sum(areas[:level]) for level in range(len(sizes))]
    start: int | Array = 0
    height: int | Array
    width: int | Array
    height, width = sizes[0]
    if levels is not None:
        start = jnp.array(starts)[levels]
        height, width = (jnp.array(side)[levels] for side in zip(*sizes, strict=True))
    row, row_weights, row_slopes = _locate_on_axis(border, y, height)
    column, column_weights, column_slopes = _locate_on_axis(border, x, width)
    if method == "quads":
        # Row i of a table's grid starts with cell i - 1.
        row, column = jnp.clip(row + 1, 0, height), jnp.clip(column + 1, 0, width)
        rows: tuple[Array, ...] = (start + row * (width + 1) + column,)
    else:
        rows = tuple(
            start + jnp.clip(row + i, 0, height - 1) * width + jnp.clip(column + j, 0, width - 1)
            for i in (0, 1)
            for j in (0, 1)
        )

    def products(of_row, of_column):
        return tuple(of_row[i] * of_column[j] for i in (0, 1) for j in (0, 1))

    return Place(
        rows,
        products(row_weights, column_weights),
        products(row_slopes, column_weights),
        products(row_weights, column_slopes),
    )


def _locate_on_axis(border, points, size):
    """Returns the first of the two cells, the weights of both and their derivatives."""
    counted, free = 1.0, 1.0
    if border == "clamp":
        counted = ((points >= -1.0) & (points <= size)).astype(jnp.float32)
        free = ((points >= 0.0) & (points < size - 1.0)).astype(jnp.float32)
        points = jnp.clip(points, 0.0, size - 1.0)
    points = jnp.clip(points, -2.0, size)  # keeps any float32 within int32
    first = jnp.floor(points)
    fraction = points - first
    # Clamped as integers, so that a NaN point cannot leave the table.
    first = jnp.clip(first.astype(jnp.int32), -2, size)
    low = ((first >= 0) & (first < size)) * counted
    high = ((first >= -1) & (first < size - 1)) * counted
    return first, ((1.0 - fraction) * low, fraction * high), (-low * free, high * free)


def make_table(method: str, maps: Sequence[Float[Array, "H W C"]]) -> Float[Array, "Z D"]:
    """Rows of all maps of one image, map after map."""
    if method == "quads":
        maps = [_quads(feature) for feature in maps]
    return jnp.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])


def _quads(feature):
    """(H + 1, W + 1, 4C): each 2 x 2 cells of the map with a border of zeros around it."""
    height, width = feature.shape[:2]
    padded = jnp.pad(feature, ((1, 1), (1, 1), (0, 0)))
    corners = [padded[i : height + 1 + i, j : width + 1 + j] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)


def fold_table(
    method: str, sizes: Sizes, table: Float[Array, "Z D"]
) -> tuple[Float[Array, "H W C"], ...]:
    """Transpose of `make_table`."""
    margin = 1 if method == "quads" else 0
    grids = [(height + margin, width + margin) for height, width in sizes]
    ends = [sum(h * w for h, w in grids[: level + 1]) for level in range(len(grids) - 1)]
    parts = [
        part.reshape(*grid, part.shape[-1])
        for part, grid in zip(jnp.split(table, ends), grids, strict=True)
    ]
    return tuple(_fold_quads(part) if margin else part for part in parts)


def _fold_quads(quads):
    height, width = quads.shape[0] - 1, quads.shape[1] - 1
    corners = jnp.split(quads, 4, axis=-1)
    return sum(
        corners[2 * i + j][1 - i : height + 1 - i, 1 - j : width + 1 - j]
        for i in (0, 1)
        for j in (0, 1)
    )


def read(
    table: Float[Array, "Z D"], rows: tuple[Int[Array, " N"], ...]
) -> Sequence[Float[Array, "N C"]]:
    """Values of the four cells."""
    values = [table.at[r].get(mode="promise_in_bounds") for r in rows]
    return jnp.split(values[0], 4, axis=-1) if len(rows) == 1 else values


def add(
    table: Float[Array, "Z D"],
    rows: tuple[Int[Array, " N"], ...],
    weights: Four,
    values: Float[Array, "N C"],
) -> Float[Array, "Z D"]:
    """Adds `values`, weighted, to the four cells."""
    updates = [weight[:, None] * values for weight in weights]
    if len(rows) == 1:
        updates = [jnp.concatenate(updates, axis=-1)]
    for r, update in zip(rows, updates, strict=True):
        table = table.at[r].add(update, mode="promise_in_bounds")
    return table


def interpolate(weights: Four, cells: Sequence[Float[Array, "N C"]]) -> Float[Array, "N C"]:
    """Weighted sum of the four cells, float32."""
    # One addend per cell keeps channels innermost in XLA's loop, which vectorises it on CPU.
    addends = (w[:, None] * c.astype(jnp.float32) for w, c in zip(weights, cells, strict=True))
    return functools.reduce(jnp.add, addends)


def contract(cells: Sequence[Float[Array, "N C"]], grad: Float[Array, "N C"]) -> Four:
    """Gradients of the weights: sums over channels of each cell times `grad`."""
    return tuple(jnp.sum(cell.astype(jnp.float32) * grad, axis=-1) for cell in cells)


def dot(a: Four, b: Four) -> Float[Array, " N"]:
    """Sum over the four cells of products."""
    return functools.reduce(jnp.add, map(jnp.multiply, a, b))
