"""RoIAlign with about one sample a feature cell, however large the RoI: sampling ratio 0 of
torchvision's operator, as detectron2 and mmdetection use it.

A bin of h x w cells is the mean of ceil(h) x ceil(w) bilinear samples. As in
`common.geometry.roi_align`, a bilinear weight is the product of a row and a column factor, and so
is the mean: two dense contractions with the weights of whole rows and columns. The number of
samples differs from RoI to RoI, so the weights are summed in a loop as long as the largest RoI
needs.

Shape legend:
  B: images   R: RoIs per image   H, W: feature height, width   C: channels   S: output_size
  T: cells of a row or column
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from common.geometry.roi_align import hat_weights, locate_windows

_CHUNK = 64  # RoIs of an image at a time: their rows of features are large


def adaptive_roi_align(
    features: Sequence[Float[Array, "B H W C"]],
    boxes: Float[Array, "B R 4"],
    strides: Sequence[int],
    *,
    output_size: int,
    aligned: bool = True,
) -> Float[Array, "B R S S C"]:
    """`common.geometry.roi_align.roi_align` with a number of samples that follows the RoI's size.

    Arguments and errors as there.
    """
    levels, start, size = locate_windows(features, boxes, strides, aligned)

    def pooled(windows):
        """Of RoIs of every image, (B, r)."""
        levels, start, size = windows
        output = 0.0
        for level, feature in enumerate(features):
            rows, columns = (
                _mean_weights(start[..., axis], size[..., axis], output_size, cells)
                for axis, cells in ((1, feature.shape[1]), (0, feature.shape[2]))
            )
            rows = jnp.where((levels == level)[..., None, None], rows, 0.0).astype(feature.dtype)
            crops = jnp.einsum("brsh,bhwc->brswc", rows, feature)
            # All terms of this sum but one are zero: exact in any precision.
            output += jnp.einsum("brtw,brswc->brstc", columns.astype(feature.dtype), crops)
        return output

    num_rois = boxes.shape[1]
    chunk = min(_CHUNK, num_rois)
    pad = -num_rois % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    # Recomputed in the backward pass: what is kept of all chunks would be large.
    parts = lax.map(jax.checkpoint(pooled), jax.tree.map(chunks, (levels, start, size)))
    result = jnp.moveaxis(parts, 0, 1)
    return result.reshape(result.shape[0], -1, *result.shape[3:])[:, :num_rois]


def _mean_weights(
    start: Float[Array, "B R"], size: Float[Array, "B R"], output_size: int, cells: int
) -> Float[Array, "B R S T"]:
    """Weights of the cells of a row or column in each bin, means over its samples."""
    length = size / output_size
    num_samples = jnp.ceil(length)  # of an empty RoI none, which then has only zeros
    count = jnp.maximum(num_samples, 1.0)
    first = start[..., None] + length[..., None] * jnp.arange(output_size)

    def add(state):
        number, total = state
        points = first + ((number + 0.5) * length / count)[..., None]
        weights = hat_weights(points[..., None], cells, jnp.arange(cells))
        return number + 1, total + jnp.where((number < num_samples)[..., None, None], weights, 0.0)

    total = jnp.zeros((*first.shape, cells))
    # Boxes have no gradient, so the loop needs none.
    _, total = lax.while_loop(lambda state: state[0] < num_samples.max(), add, (0, total))
    return total / count[..., None, None]
