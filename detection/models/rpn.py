"""Region proposal network: class-free boxes from anchors.

Shape legend
  B  images
  L  pyramid levels
  A  anchors per location
  n  anchors of one level: H * W * A
  P  proposals per image
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.geometry import boxes as box_ops
from common.geometry.nms import nms_mask
from common.nn.layers.conv import Conv
from detection.models.settings import ProposalSettings
from detection.structures import Proposals


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then one objectness logit and four deltas per anchor."""

    num_anchors: int
    channels: int = 256
    num_convs: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, levels: Sequence[Float[Array, "B H W C"]]
    ) -> tuple[list[Float[Array, "B n"]], list[Float[Array, "B n 4"]]]:
        """Logits and deltas of each level, in anchor order of `detection.assign.anchors`."""
        init = nn.initializers.normal(0.01)
        options: dict[str, Any] = dict(use_bias=True, dtype=self.dtype, kernel_init=init)
        shared = [
            Conv(self.channels, (3, 3), name=f"conv{number}", **options)
            for number in ("", *range(2, self.num_convs + 1))
        ]
        objectness = Conv(self.num_anchors, (1, 1), name="objectness", **options)
        regression = Conv(4 * self.num_anchors, (1, 1), name="deltas", **options)
        logits, deltas = [], []
        for x in levels:
            for conv in shared:
                x = nn.relu(conv(x))
            batch = x.shape[0]
            logits.append(objectness(x).reshape(batch, -1).astype(jnp.float32))
            deltas.append(regression(x).reshape(batch, -1, 4).astype(jnp.float32))
        return logits, deltas


def propose(
    logits: Sequence[Float[Array, "B n"]],
    deltas: Sequence[Float[Array, "B n 4"]],
    anchors: Sequence[Float[Array, "n 4"]],
    image_size: Float[Array, "B 2"],
    options: ProposalSettings,
) -> Proposals:
    """The best boxes: top `pre_nms` of each level, NMS within it, top `post_nms` over levels.

    Args:
      logits: objectness of each level.
      deltas: box regression of each level (standard deviations 1).
      anchors: of each level, pixels.
      image_size: content height, width; boxes are clipped to it.
      options: `pre_nms` candidates are kept per level and `post_nms` proposals per image (P);
        `nms_iou` is the overlap above which the weaker candidate of a level is dropped.
    """
    pre_nms = options.pre_nms
    level_boxes, level_scores = [], []
    for objectness, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        count = min(pre_nms, objectness.shape[1])
        top, index = jax.lax.top_k(objectness, count)
        chosen = jnp.take_along_axis(level_deltas, index[..., None], axis=1)
        decoded = box_ops.clip(box_ops.decode(chosen, level_anchors[index]), image_size)
        # All levels share one padded shape, so that one batched NMS serves the pyramid.
        missing = pre_nms - count
        level_boxes.append(jnp.pad(decoded, ((0, 0), (0, missing), (0, 0))))
        level_scores.append(jnp.pad(top, ((0, 0), (0, missing)), constant_values=-jnp.inf))
    boxes = jnp.stack(level_boxes, axis=1)  # (B, L, pre_nms, 4)
    scores = jnp.stack(level_scores, axis=1)
    valid = box_ops.is_valid(boxes) & jnp.isfinite(scores)
    suppress = jax.vmap(jax.vmap(nms_mask, (0, 0, 0, None)), (0, 0, 0, None))
    keep = suppress(boxes, scores, valid, options.nms_iou)
    batch = boxes.shape[0]
    scores = jnp.where(keep, scores, -jnp.inf).reshape(batch, -1)
    top, index = jax.lax.top_k(scores, min(options.post_nms, scores.shape[1]))
    boxes = jnp.take_along_axis(boxes.reshape(batch, -1, 4), index[..., None], axis=1)
    return Proposals(boxes, jnp.isfinite(top), top)
