"""Anchor boxes of a feature pyramid.

Shape legend
  H, W  height and width of one pyramid level (cells)
  A     anchors per location: len(ratios) * len(scales), ratio-major
  N     anchors of all levels: sum of H * W * A, in level, row, column, anchor order
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.io.errors import UserError

RATIO_CONVENTIONS = ("h/w", "w/h")


def cell_anchors(
    stride: int,
    scales: Sequence[float],
    ratios: Sequence[float],
    convention: str = "h/w",
    rounded: bool = False,
) -> np.ndarray:
    """Anchors of one location, centred on the origin with area (stride * scale)^2.

    Args:
      stride: pixels per cell of the level.
      scales: side of the square anchor in strides.
      ratios: height over width ("h/w") or width over height ("w/h").
      convention: which of the two readings of `ratios` applies.
      rounded: sides of the anchors lie on whole pixels from the centre, as torchvision has them.

    Returns:
      (A, 4) float32 xmin, ymin, xmax, ymax in pixels.

    Raises:
      UserError: unknown convention.
    """
    if convention not in RATIO_CONVENTIONS:
        raise UserError(
            f"model.anchors.ratio_convention: found {convention!r}, expected one of "
            f"{RATIO_CONVENTIONS}"
        )
    root = np.sqrt(np.asarray(ratios, np.float64))[:, None]
    side = stride * np.asarray(scales, np.float64)[None, :]
    height, width = side * root, side / root
    if convention == "w/h":
        height, width = width, height
    half = np.stack([width.ravel(), height.ravel()], axis=-1) / 2
    half = np.round(half) if rounded else half
    return np.concatenate([-half, half], axis=-1).astype(np.float32)


def grid_anchors(
    feature_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scales: Sequence[float],
    ratios: Sequence[float],
    convention: str = "h/w",
    centre: float = 0.5,
    rounded: bool = False,
    spacing: Sequence[tuple[int, int]] | None = None,
) -> list[Float[Array, "HWA 4"]]:
    """Anchors of every level, one (H * W * A, 4) array a level.

    Built from iotas instead of constants: 18 anchors a location at 800x1333 are 1.6 M boxes, which
    would otherwise be baked into the program.

    Args:
      feature_shapes: (H, W) of each level.
      strides: pixels per cell of each level.
      scales: see `cell_anchors`.
      ratios: see `cell_anchors`.
      convention: see `cell_anchors`.
      centre: position of the anchor centre within its cell; 0.5 is the middle, 0 the corner
        (mmdetection 2, and with `rounded` torchvision).
      rounded: see `cell_anchors`.
      spacing: pixels from cell to cell of each level, down and across; None: its stride.
    """
    levels = []
    steps = spacing or [(stride, stride) for stride in strides]
    for (height, width), stride, (down, across) in zip(feature_shapes, strides, steps, strict=True):
        cell = jnp.asarray(cell_anchors(stride, scales, ratios, convention, rounded))
        y = (jnp.arange(height, dtype=jnp.float32) + centre) * down
        x = (jnp.arange(width, dtype=jnp.float32) + centre) * across
        x, y = jnp.meshgrid(x, y)
        shift = jnp.stack([x, y, x, y], axis=-1)[:, :, None, :]
        levels.append((shift + cell).reshape(-1, 4))
    return levels
