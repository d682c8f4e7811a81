"""Targets and loss of the mask head.

Shape legend
  B  images
  R  RoIs per image
  M  padded ground-truth boxes per image
  G  side of a ground-truth mask (config.data.mask_size)
  S  side of a predicted mask
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from detection.losses.classification import sigmoid_cross_entropy
from detection.losses.shares import share


def mask_targets(
    gt_masks: UInt8[Array, "B M G Gbytes"],
    gt_boxes: Float[Array, "B R 4"],
    matched_idx: Int[Array, "B R"],
    rois: Float[Array, "B R 4"],
    size: int,
) -> Bool[Array, "B R S S"]:
    """What of the matched object's mask lies in each RoI: pixels of which it covers half or more.

    Coverage is exact: the mean of the ground-truth mask over the area of a pixel, 0 outside its
    box. It is what RoIAlign of the mask tends to with more and more samples a bin.

    Args:
      gt_masks: of each object, cropped to its box; bits of a row in bytes, as `numpy.packbits`.
      gt_boxes: the matched box of each RoI, pixels, which its mask covers.
      matched_idx: its index, of M.
      rois: pixels.
      size: S.
    """
    num_bits = gt_masks.shape[2]
    masks = jnp.take_along_axis(gt_masks, matched_idx[:, :, None, None], axis=1)
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    bits = (masks[..., None] >> shifts) & 1
    bits = bits.reshape(*masks.shape[:3], num_bits).astype(jnp.float32)
    rows = _coverage(gt_boxes[..., 1::2], rois[..., 1::2], num_bits, size)
    columns = _coverage(gt_boxes[..., 0::2], rois[..., 0::2], num_bits, size)
    # A TPU would otherwise round to bfloat16, which moves pixels over the half.
    exact = jax.lax.Precision.HIGHEST
    covered = jnp.einsum("brsg,brgh->brsh", rows, bits, precision=exact)
    covered = jnp.einsum("brsh,brth->brst", covered, columns, precision=exact)
    return covered >= 0.5


def _coverage(
    span: Float[Array, "B R 2"], window: Float[Array, "B R 2"], cells: int, bins: int
) -> Float[Array, "B R S G"]:
    """Share of each bin of `window` that lies in each cell of `span`; zeros where it has no length.

    Args:
      span: first and last coordinate of the ground-truth mask along one axis.
      window: those of the RoI.
      cells: G.
      bins: S.
    """
    length = span[..., 1:] - span[..., :1]
    usable = length > 0
    edges = window[..., :1] + (window[..., 1:] - window[..., :1]) * jnp.linspace(0, 1, bins + 1)
    edges = (edges - span[..., :1]) / jnp.where(usable, length, 1.0) * cells
    low, high = edges[..., :-1, None], edges[..., 1:, None]
    cell = jnp.arange(cells)
    shared = jnp.minimum(high, cell + 1) - jnp.maximum(low, cell)
    usable = usable[..., None] & (high > low)
    return jnp.where(usable, jnp.maximum(shared, 0.0) / jnp.where(usable, high - low, 1.0), 0.0)


def mask_losses(
    logits: Float[Array, "B R S S"],
    target: Bool[Array, "B R S S"],
    counted: Bool[Array, "B R"],
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Binary cross-entropy, mean over pixels and counted RoIs, and the RoIs' mean IoU.

    Args:
      logits: of the class of each RoI.
      target: from `mask_targets`.
      counted: positive RoIs whose object has a mask.
      axis_name: device axis over which RoIs are counted.
    """
    loss = sigmoid_cross_entropy(logits, target).mean(axis=(-2, -1))
    found = logits > 0
    union = (found | target).sum(axis=(-2, -1))
    iou = (found & target).sum(axis=(-2, -1)) / jnp.maximum(union, 1)
    count = counted.sum()
    return share(loss, counted, count, axis_name), share(iou, counted, count, axis_name)
