"""Faster R-CNN with a feature pyramid (Ren et al. 2015; Lin et al. 2017): the paper's trunk.

Shape legend
  B     images of the global batch
  H, W  canvas, pixels
  M     padded ground-truth boxes
  K     classes
  D     detections per image

Batch fields used (common.data.input): image uint8 (B,H,W,3), image_size float32 (B,2) content
height and width, image_valid bool (B,); in training also boxes (B,M,4) pixels, classes (B,M)
0..K-1 and valid (B,M).
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, UInt8

from common import boxes as box_ops
from common.nms import multiclass_nms
from common.nn.backbones import make_backbone, preprocessing
from common.roi_align import roi_align
from detection import anchors as anchor_ops
from detection.models import box_head as box_head_ops
from detection.models import rpn as rpn_ops
from detection.models.fpn import FPN

STRIDES = (4, 8, 16, 32, 64)
ROI_STRIDES = STRIDES[:4]


def normalise(
    images: UInt8[Array, "B H W 3"],
    image_size: Float[Array, "B 2"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: jnp.dtype,
) -> Float[Array, "B H W 3"]:
    """(pixel - mean) / std inside the content, exactly 0 in the padding."""
    height, width = images.shape[1:3]
    inside = (jnp.arange(height)[:, None] < image_size[:, None, None, 0]) & (
        jnp.arange(width)[None, :] < image_size[:, None, None, 1]
    )
    # Multiplying by 1 / std: a division a pixel is what the TPU's vector unit is slow at.
    scale = 1.0 / jnp.asarray(std, jnp.float32)
    x = (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) * scale
    return jnp.where(inside[..., None], x, 0.0).astype(dtype)


class FasterRCNN(nn.Module):
    """The detector. Fields mirror `config.model`; `build` makes one from a config."""

    num_classes: int
    settings: ml_collections.FrozenConfigDict
    axis_name: str | None = None

    def setup(self):
        s = self.settings
        dtype = jnp.dtype(s.dtype)
        self.backbone = make_backbone(
            s.backbone, norm=s.norm, frozen_stages=s.frozen_stages, remat=s.remat,
            axis_name=self.axis_name, dtype=dtype, drop_path_rate=s.drop_path_rate,
        )
        self.fpn = FPN(s.fpn_channels, dtype=dtype)
        num_anchors = len(s.anchors.scales) * len(s.anchors.ratios)
        self.rpn_head = rpn_ops.RPNHead(num_anchors, s.fpn_channels, dtype=dtype)
        self.box_head = box_head_ops.TwoFCHead(
            self.num_classes, s.box_head.width, dtype=dtype
        )

    def features(self, batch: Mapping[str, Array], train: bool) -> dict[str, Array]:
        """Pyramid levels p2..p6 of the batch's images."""
        mean, std = preprocessing(self.settings.backbone)
        images = normalise(
            batch["image"], batch["image_size"], mean, std, jnp.dtype(self.settings.dtype)
        )
        return self.fpn(self.backbone(images, train=train))

    def anchors(self, levels: list[Array]) -> list[Array]:
        """Anchors of each level, pixels."""
        a = self.settings.anchors
        shapes = [level.shape[1:3] for level in levels]
        return anchor_ops.grid_anchors(
            shapes, STRIDES, a.scales, a.ratios, a.ratio_convention, a.centre
        )

    def pool(self, levels: list[Array], boxes: Float[Array, "B R 4"]) -> Array:
        """(B, R, S, S, C) features of each box, from the level that fits its size."""
        return roi_align(
            levels[: len(ROI_STRIDES)], boxes, ROI_STRIDES,
            output_size=self.settings.box_head.pool_size, sampling_ratio=2,
            aligned=self.settings.box_head.aligned,
        )

    def __call__(self, batch: Mapping[str, Array], train: bool) -> dict[str, Array]:
        """Losses and monitoring figures (train) or detections (not train); see the two methods."""
        return self.losses(batch) if train else self.detect(batch)

    def losses(self, batch: Mapping[str, Array]) -> dict[str, dict[str, Float[Array, ""]]]:
        """{'losses': terms that are summed, 'monitor': figures that are only logged}.

        Both are this device's shares (`detection.losses`). Needs the random stream 'sampling', the
        same key on all devices: what is drawn for an image depends on that key and on the image's
        slot in the global batch, never on the number of devices.
        """
        s, axis_name = self.settings, self.axis_name
        pyramid = self.features(batch, train=True)
        levels = [pyramid[name] for name in sorted(pyramid)]
        anchors = self.anchors(levels)
        logits, deltas = self.rpn_head(levels)

        slots = jnp.arange(batch["image"].shape[0])
        if axis_name is not None:
            slots += jax.lax.axis_index(axis_name) * slots.size
        slot_keys = jax.vmap(jax.random.fold_in, (None, 0))
        rpn_keys = slot_keys(self.make_rng("sampling"), slots)
        roi_keys = slot_keys(self.make_rng("sampling"), slots)

        terms = rpn_ops.rpn_losses(
            rpn_keys, logits, deltas, anchors, batch["image_size"], batch["boxes"], batch["valid"],
            batch["image_valid"], axis_name=axis_name, **s.rpn.loss,
        )
        proposals = rpn_ops.propose(
            *jax.lax.stop_gradient((logits, deltas)), anchors, batch["image_size"],
            **s.rpn.train_proposals,
        )
        targets = box_head_ops.sample_rois(
            roi_keys, proposals, batch["boxes"], batch["classes"], batch["valid"],
            **s.box_head.sample,
        )
        class_logits, box_deltas = self.box_head(self.pool(levels, targets.boxes))
        terms |= box_head_ops.box_head_losses(
            class_logits, box_deltas, targets, batch["image_valid"], stds=s.box_head.stds,
            axis_name=axis_name, **s.box_head.loss,
        )
        monitor = box_head_ops.head_accuracy(
            class_logits, targets, batch["image_valid"], axis_name
        )
        weights = s.loss_weights
        terms = {name: value * weights.get(name, 1.0) for name, value in terms.items()}
        return {"losses": terms, "monitor": monitor}

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Detections: boxes (B,D,4) canvas pixels, scores, classes 0..K-1 and valid, each (B,D)."""
        s = self.settings
        pyramid = self.features(batch, train=False)
        levels = [pyramid[name] for name in sorted(pyramid)]
        logits, deltas = self.rpn_head(levels)
        proposals = rpn_ops.propose(
            logits, deltas, self.anchors(levels), batch["image_size"], **s.rpn.test_proposals
        )
        class_logits, box_deltas = self.box_head(self.pool(levels, proposals.boxes))
        scores = jax.nn.softmax(class_logits)[..., 1:]
        boxes = box_ops.decode(box_deltas, proposals.boxes[:, :, None], s.box_head.stds)
        size = batch["image_size"][:, None]
        boxes = jax.vmap(jax.vmap(box_ops.clip, (0, None)))(boxes, size[:, 0])
        valid = proposals.valid & batch["image_valid"][:, None]
        if s.get("drop_background_rois", False):
            # Stricter than the score threshold, for experts (FACTS 5).
            valid &= class_logits.argmax(axis=-1) != 0

        def select(boxes, scores, valid):
            return multiclass_nms(boxes, scores, valid, **s.detections)

        return jax.vmap(select)(boxes, scores, valid)


def build(
    model_config: ml_collections.ConfigDict, num_classes: int, axis_name: str | None = None
) -> FasterRCNN:
    """Makes the detector of a config.

    Args:
      model_config: `config.model`.
      num_classes: K, from the dataset directory.
      axis_name: device axis over which losses are counted and synchronised batch norm averages;
        None when the model sees the whole batch.
    """
    return FasterRCNN(num_classes, ml_collections.FrozenConfigDict(model_config), axis_name)
