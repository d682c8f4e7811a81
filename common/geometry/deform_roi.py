"""Deformable RoI pooling: RoIAlign whose bins are moved by offsets (Dai et al. 2017, section 2.2).

Shape legend:
  B: images   R: RoIs per image   H, W: feature height, width   C: channels   S: output_size
  Q: samples along each axis of a bin (sampling_ratio)
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from common.geometry import bilinear
from common.geometry.roi_align import locate_windows, sample_steps

SAMPLE_MODES = {"centre": 0.5, "edge": 0.0}  # position of a sample in its part of the bin


def deform_roi_align(
    features: Sequence[Float[Array, "B H W C"]],
    boxes: Float[Array, "B R 4"],
    offsets: Float[Array, "B R S S 2"],
    strides: Sequence[int],
    *,
    output_size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = True,
    sample_mode: str = "centre",
    method: str | None = None,
) -> Float[Array, "B R S S C"]:
    """Crops every RoI from its pyramid level into S x S bins, each moved by an offset of its own.

    Equals `roi_align` where the offsets are zero, with the same rule for samples outside the map.
    Differentiable once, in reverse mode, with respect to the features and the offsets.

    Args:
      features: one map per level, finest first.
      boxes: pixels of the input canvas. They choose the level, wherever the bins move to, and get
        no gradient.
      offsets: (x, y), shares of the RoI's width and height, for bin (row, column);
        `(B, R, 1, 1, 2)` moves all bins alike.
      strides: input pixels per feature cell, of each level; consecutive powers of two.
      output_size: S.
      sampling_ratio: Q, at least 1.
      aligned: as of `roi_align`.
      sample_mode: 'centre' puts each sample in the middle of its part of the bin, as RoIAlign does;
        'edge' at its left and upper edge, as the released code of TSD (with 4 samples an axis).
      method: one of `bilinear.METHODS`; None takes what suits the platform that the program is
        compiled for.

    Raises:
      ValueError: unknown method or mode, offsets of another shape, strides or sampling_ratio that
        make no pyramid.
    """
    if sample_mode not in SAMPLE_MODES:
        raise ValueError(f"sample_mode {sample_mode!r}, expected one of {(*SAMPLE_MODES,)}")
    grid = (*boxes.shape[:2], output_size, output_size)
    if offsets.shape not in ((*grid, 2), (*boxes.shape[:2], 1, 1, 2)):
        raise ValueError(f"offsets of shape {offsets.shape}, expected {(*grid, 2)}")
    levels, start, size = locate_windows(features, boxes, strides, aligned)
    steps = sample_steps(output_size, sampling_ratio, SAMPLE_MODES[sample_mode]).T
    offsets = offsets.astype(jnp.float32)

    def points(axis, steps):
        """(B, Q * Q, R * S * S), in cells; `steps` broadcasts to (Q, Q, R, S, S)."""
        first, length = (a[:, None, None, :, None, None, axis] for a in (start, size))
        points = first + length * (steps + offsets[:, None, None, ..., axis])
        points = jnp.broadcast_to(points, (grid[0], sampling_ratio, sampling_ratio, *grid[1:]))
        return points.reshape(grid[0], sampling_ratio**2, -1)

    pooled = bilinear.sample_mean(
        features,
        jnp.repeat(levels, output_size**2, axis=1),
        points(1, steps[:, None, None, :, None]),
        points(0, steps[None, :, None, None, :]),
        border="clamp",
        method=method,
    )
    return pooled.reshape(*grid, -1)
