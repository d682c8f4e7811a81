"""Anchor scales and ratios by k-means over the boxes of a dataset, and how much anchors recall.

The distance between two shapes is Euclidean in (log width, log height). With u = log(h/w) and
v = log(sqrt(w h)) its square is 2 dv^2 + du^2 / 2: where every scale goes with every ratio, as in
the proposal network, the nearest anchor has the nearest ratio and, independently, the nearest side
of any level. So k-means over such a grid falls apart into two one-dimensional ones, which work on
histograms: one pass over the boxes, however many there are. The ratios are the global optimum
(dynamic programming). For the scales, a side counts modulo the levels' strides; Lloyd's iteration
runs from many starts.

Shape legend
  n  boxes, N images
  A  anchors per location, L levels
  k  clusters, B histogram bins
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from detection.assign.anchors import cell_anchors

THRESHOLDS = (0.5, 0.7)
_STEP = 0.005  # of the histograms, in octaves
_OCTAVES = (-12.0, 12.0)  # of ratio and of side in pixels
_CHUNK = 1 << 15  # boxes that a compiled step takes


def fitted_sizes(
    sizes: Int[np.ndarray, "N 2"], canvas: tuple[int, int]
) -> Float[np.ndarray, "N 2"]:
    """Height, width of photos on the canvases of training, all at once.

    Args:
      sizes: height, width.
      canvas: short and long side, `config.data.canvas`.
    """
    sides = np.maximum(sizes, 1)
    ratio = np.minimum(canvas[0] / sides.min(axis=1), canvas[1] / sides.max(axis=1))[:, None]
    return np.maximum(1.0, np.floor(sizes * ratio + 0.5))


class ShapeHistograms:
    """Counts of boxes by log2(height / width) and by log2 of the side of the square of equal area.

    Attributes:
      values: (B,) middles of the bins.
      ratios: (B,) boxes of each ratio.
      sides: (B,) boxes of each side.
    """

    def __init__(self):
        count = round((_OCTAVES[1] - _OCTAVES[0]) / _STEP)
        self._edges = np.linspace(*_OCTAVES, count + 1)
        self.values = (self._edges[1:] + self._edges[:-1]) / 2
        self.ratios, self.sides = np.zeros(count), np.zeros(count)

    def add(self, widths: Float[np.ndarray, " n"], heights: Float[np.ndarray, " n"]) -> None:
        """Counts boxes, in pixels."""
        log_width, log_height = np.log2(widths), np.log2(heights)
        for counts, values in (
            (self.ratios, log_height - log_width),
            (self.sides, (log_height + log_width) / 2),
        ):
            place = ((values - _OCTAVES[0]) / _STEP).astype(np.int64)
            place = np.clip(place, 0, len(counts) - 1)
            counts += np.bincount(place, minlength=len(counts))


def best_ratios(shapes: ShapeHistograms, count: int) -> list[float]:
    """Height over width of each cluster: the exact optimum of one-dimensional k-means."""
    return [float(2.0**centre) for centre in kmeans_1d(shapes.values, shapes.ratios, count)]


def kmeans_1d(
    values: Float[np.ndarray, " B"], weights: Float[np.ndarray, " B"], count: int
) -> Float[np.ndarray, " k"]:
    """Optimal cluster centres of weighted, ascending values, by dynamic programming in O(k B^2)."""
    used = weights > 0
    values, weights = values[used], weights[used]
    size = len(values)
    total, first, second = (
        np.concatenate([[0.0], np.cumsum(weights * values**power)]) for power in (0, 1, 2)
    )

    def cost(start, stop):
        """Squared deviations of the values [start, stop) from their mean."""
        mass = np.maximum(total[stop] - total[start], 1e-9)
        return second[stop] - second[start] - (first[stop] - first[start]) ** 2 / mass

    starts, stops = np.arange(size)[:, None], np.arange(1, size + 1)[None, :]
    costs = np.where(starts < stops, cost(starts, stops), np.inf)
    best, splits = costs[0], []  # best[j]: of the values [0, j], with the clusters so far
    for _ in range(min(count, size) - 1):
        # A further cluster from `start` on: the ones before end at start - 1.
        options = np.concatenate([[np.inf], best[:-1]])[:, None] + costs
        splits.append(options.argmin(axis=0))
        best = options.min(axis=0)
    stop, centres = size, []
    for split in [*reversed(splits), np.zeros(size, int)]:
        start = split[stop - 1]
        centres.append((first[stop] - first[start]) / (total[stop] - total[start]))
        stop = start
    return np.array(centres[::-1])


def best_scales(shapes: ShapeHistograms, strides: Sequence[int], count: int) -> list[float]:
    """Side of the square anchor in strides, of each cluster.

    A box belongs to the nearest of all scales on all levels; a scale is the mean of what its boxes
    need on their levels.
    """
    used = shapes.sides > 0
    sides, weights = shapes.values[used], shapes.sides[used]
    levels = np.log2(np.array(strides, float))
    best, best_cost = np.zeros(count), np.inf
    for seed in range(4 * count + 8):
        rng = np.random.default_rng(seed)
        octave = np.arange(count) / count if seed % 2 == 0 else rng.random(count)
        centres = rng.uniform(2.0, 4.0) + octave  # the smallest between 4 and 16
        for _ in range(100):
            distance, nearest, needed = _assign(sides, centres, levels)
            mass = np.bincount(nearest, weights, count)
            moved = np.bincount(nearest, weights * needed, count) / np.maximum(mass, 1e-300)
            moved = np.where(mass > 0, moved, centres)
            if np.allclose(moved, centres, atol=1e-6):
                break
            centres = moved
        distance, _, _ = _assign(sides, centres, levels)
        cost = (weights * distance**2).sum()
        if cost < best_cost * (1 - 1e-9):
            best, best_cost = centres, cost
    return sorted(float(2.0**centre) for centre in best)


def _assign(sides, centres, levels):
    """Distance of each side to the nearest scale on any level, which scale, and side / stride."""
    targets = (centres[:, None] + levels[None, :]).ravel()
    offsets = np.abs(sides[:, None] - targets)
    place = offsets.argmin(axis=1)
    return offsets.min(axis=1), place // len(levels), sides - levels[place % len(levels)]


# ------------------------------------------------------------------------------------- recall


@dataclasses.dataclass(frozen=True)
class AnchorSet:
    """Anchors of every location and level, as `config.model.anchors` has them."""

    name: str
    scales: tuple[float, ...]
    ratios: tuple[float, ...]
    convention: str = "h/w"

    @property
    def size(self) -> int:
        return len(self.scales) * len(self.ratios)


class Recall:
    """How well anchors cover boxes; boxes come in pieces.

    Two readings: `grid` is the IoU with the best anchor among those that exist, at their places;
    `shape` puts an anchor of each shape onto the middle of the box, the upper bound of the first.
    """

    def __init__(
        self,
        anchors: AnchorSet,
        canvas: tuple[int, int],
        strides: Sequence[int],
        num_classes: int,
        centre: float = 0.5,
    ):
        """Starts at no boxes.

        Args:
          anchors: to judge.
          canvas: padded height, width; the grid of a level has ceil(side / stride) cells.
          strides: of the levels, pixels.
          num_classes: K.
          centre: of an anchor in its cell.
        """
        self._strides = tuple(strides)
        cells = [
            cell_anchors(stride, anchors.scales, anchors.ratios, anchors.convention)
            for stride in strides
        ]
        self._shapes = np.stack([cell[:, 2:] - cell[:, :2] for cell in cells])  # (L, A, 2)
        self._grids = np.array([[-(-side // s) for side in canvas[::-1]] for s in strides])
        self._centre = centre
        self.count = 0
        self._sums = {"grid": 0.0, "shape": 0.0}
        self._hits = {
            kind: np.zeros((len(THRESHOLDS), num_classes), np.int64) for kind in self._sums
        }
        self._boxes = np.zeros(num_classes, np.int64)

    def add(self, boxes: Float[np.ndarray, "n 4"], classes: Int[np.ndarray, " n"]) -> None:
        """Counts boxes, in canvas pixels."""
        for start in range(0, len(boxes), _CHUNK):
            piece = boxes[start : start + _CHUNK]
            owner = classes[start : start + _CHUNK]
            padded = np.zeros((_CHUNK, 4), np.float32)
            padded[: len(piece)] = piece
            overlaps = best_overlaps(
                padded,
                self._shapes,
                self._grids,
                np.array(self._strides, np.float32),
                np.float32(self._centre),
            )
            for kind, overlap in zip(("grid", "shape"), overlaps, strict=True):
                overlap = np.asarray(overlap)[: len(piece)]
                self._sums[kind] += float(overlap.sum(dtype=np.float64))
                for row, threshold in enumerate(THRESHOLDS):
                    self._hits[kind][row] += np.bincount(
                        owner[overlap >= threshold], minlength=len(self._boxes)
                    )
            self._boxes += np.bincount(owner, minlength=len(self._boxes))
            self.count += len(piece)

    def result(self) -> dict[str, float]:
        """Recalls over boxes, and their mean over the classes with boxes; the mean best IoU."""
        has_boxes = self._boxes > 0
        figures = {}
        for kind, hits in self._hits.items():
            for threshold, row in zip(THRESHOLDS, hits, strict=True):
                figures[f"recall@{threshold}/{kind}"] = row.sum() / max(self.count, 1)
                by_class = row[has_boxes] / self._boxes[has_boxes]
                figures[f"class_mean_recall@{threshold}/{kind}"] = by_class.mean()
            figures[f"mean_iou/{kind}"] = self._sums[kind] / max(self.count, 1)
        return {name: float(value) for name, value in figures.items()}


@jax.jit
def best_overlaps(
    boxes: Float[Array, "n 4"],
    shapes: Float[Array, "L A 2"],
    grids: Int[Array, "L 2"],
    strides: Float[Array, " L"],
    centre: Float[Array, ""],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """IoU of each box with the best anchor of the grids, and with the best shape on its middle.

    The overlap of two intervals of fixed lengths only falls with the distance of their middles, and
    x and y of an anchor are chosen independently: the nearest cell is the best one, exactly.

    Args:
      boxes: canvas pixels.
      shapes: width, height of the anchors of each level.
      grids: columns, rows of each level.
      strides: of each level.
      centre: of an anchor in its cell.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    middles = (boxes[:, 2:] + boxes[:, :2]) / 2

    def visit_level(best, level):
        level_shapes, grid, stride = level
        cell = jnp.clip(jnp.round(middles / stride - centre), 0, grid - 1)
        away = jnp.abs(middles - (cell + centre) * stride)

        def visit(best, shape):
            whole = jnp.minimum(sides, shape)
            placed = jnp.clip((sides + shape) / 2 - away, 0.0, whole)
            union = sides.prod(axis=-1) + shape.prod()
            overlaps = [
                area / jnp.maximum(union - area, 1e-9)
                for area in (placed.prod(axis=-1), whole.prod(axis=-1))
            ]
            return tuple(map(jnp.maximum, best, overlaps)), None

        return jax.lax.scan(visit, best, level_shapes)

    zero = jnp.zeros(len(boxes))
    best, _ = jax.lax.scan(visit_level, (zero, zero), (shapes, grids, strides))
    return best


def has_area(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """Boxes that have a shape."""
    return np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
