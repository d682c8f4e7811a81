"""The two-stage detector: Faster R-CNN, Cascade R-CNN, Decoupling Head, decoupled backbone.

Backbone, pyramid, proposal network (Ren et al. 2015; Lin et al. 2017), then the second stage of
`detection.models.second_stage`. With `split_after` the backbone forks after that tap (paper section
5.2): one branch for classes and one for boxes, each with a pyramid and heads of its own.

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

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, UInt8

from common.deform_roi import deform_roi_align
from common.errors import UserError
from common.nms import multiclass_nms
from common.nn.backbones import make_backbone, preprocessing
from common.roi_align import roi_align
from detection import anchors as anchor_ops
from detection.models import rpn as rpn_ops
from detection.models import second_stage
from detection.models.box_head import TwoFCHead
from detection.models.decoupling_head import DecouplingHead
from detection.models.fpn import FPN
from detection.models.nas_fpn import NASFPN

NECKS = ("fpn", "nas_fpn")
HEADS = ("two_fc", "decoupling")
SPLITS = ("", "c2", "c3")
MAX_ROI_STRIDE = 32  # coarser levels serve the proposal network only


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
        _check_choices(s)
        dtype = jnp.dtype(s.dtype)
        fields = dict(
            norm=s.norm, frozen_stages=s.frozen_stages, remat=s.remat, axis_name=self.axis_name,
            dtype=dtype, drop_path_rate=s.drop_path_rate, deform=tuple(s.deform),
        )
        # The last branch serves boxes and proposals, the first one classes.
        self.branches = ("_class", "_box") if s.split_after else ("",)
        if s.split_after:
            stage = int(s.split_after[1:]) - 1
            self.backbone = make_backbone(s.backbone, last_stage=stage, **fields)
            for branch in self.branches:
                upper = make_backbone(s.backbone, first_stage=stage + 1, **fields)
                setattr(self, f"backbone{branch}", upper)
        else:
            self.backbone = make_backbone(s.backbone, **fields)
        self.stages = second_stage.read_stages(s.stages)
        for branch in self.branches:
            setattr(self, f"neck{branch}", self._make_neck(dtype))
            for name in self._head_names(branch):
                setattr(self, name, self._make_head(dtype))
        num_anchors = len(s.anchors.scales) * len(s.anchors.ratios)
        self.rpn_head = rpn_ops.RPNHead(num_anchors, s.fpn_channels, dtype=dtype)

    def _make_neck(self, dtype: jnp.dtype) -> nn.Module:
        s = self.settings
        if s.neck == "fpn":
            return FPN(s.fpn_channels, dtype=dtype)
        return NASFPN(s.fpn_channels, axis_name=self.axis_name, dtype=dtype, **s.nas_fpn)

    def _make_head(self, dtype: jnp.dtype) -> nn.Module:
        h = self.settings.box_head
        fields = dict(
            num_classes=self.num_classes, width=h.width, class_agnostic=h.class_agnostic,
            dtype=dtype,
        )
        if h.kind == "decoupling":
            return DecouplingHead(**fields, **h.offsets)
        return TwoFCHead(**fields)

    def _head_names(self, branch: str) -> list[str]:
        """`box_head`, then `box_head2` and so on in a cascade."""
        return [f"box_head{branch}{i or ''}" for i in (0, *range(2, len(self.stages) + 1))]

    def heads(self) -> list[list[nn.Module]]:
        """Box heads of each branch, of each stage."""
        return [[getattr(self, name) for name in self._head_names(b)] for b in self.branches]

    def pyramids(self, batch: Mapping[str, Array], train: bool) -> list[list[Array]]:
        """Levels of the batch's images, finest first, of each branch."""
        mean, std = preprocessing(self.settings.backbone)
        images = normalise(
            batch["image"], batch["image_size"], mean, std, jnp.dtype(self.settings.dtype)
        )
        shared = self.backbone(images, train=train)
        pyramids = []
        for branch in self.branches:
            taps = shared
            if branch:
                split = self.settings.split_after
                taps = shared | getattr(self, f"backbone{branch}")(shared[split], train=train)
            levels = getattr(self, f"neck{branch}")(taps, train)
            pyramids.append([levels[name] for name in sorted(levels)])
        return pyramids

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of the five levels."""
        s = self.settings
        finest = s.nas_fpn.min_level if s.neck == "nas_fpn" else 2
        return tuple(2 ** (finest + i) for i in range(5))

    def anchors(self, levels: list[Array]) -> list[Array]:
        """Anchors of each level, pixels."""
        a = self.settings.anchors
        shapes = [level.shape[1:3] for level in levels]
        return anchor_ops.grid_anchors(
            shapes, self.strides, a.scales, a.ratios, a.ratio_convention, a.centre
        )

    def pool(self, levels: list[Array]) -> Callable[..., Array]:
        """Function of boxes (B,R,4), and optionally shifts of each bin, to (B,R,S,S,C) features.

        Each box is read from the level that fits its size.
        """
        h = self.settings.box_head
        strides = tuple(stride for stride in self.strides if stride <= MAX_ROI_STRIDE)
        levels = levels[: len(strides)]
        options = dict(output_size=h.pool_size, sampling_ratio=2, aligned=h.aligned)

        def pooled(boxes, offsets=None):
            if offsets is None:
                return roi_align(levels, boxes, strides, **options)
            return deform_roi_align(
                levels, boxes, offsets, strides, sample_mode=h.sample_mode, **options
            )

        return pooled

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
        pyramids = self.pyramids(batch, train=True)
        anchors = self.anchors(pyramids[-1])
        logits, deltas = self.rpn_head(pyramids[-1])

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
        terms = {name: s.loss_weights[name] * value for name, value in terms.items()}
        proposals = rpn_ops.propose(
            *jax.lax.stop_gradient((logits, deltas)), anchors, batch["image_size"],
            **s.rpn.train_proposals,
        )
        box_terms, monitor = second_stage.stage_losses(
            self.heads(), [self.pool(levels) for levels in pyramids], roi_keys, proposals, batch,
            self.stages, self._branch_weights(), sample=s.box_head.sample, loss=s.box_head.loss,
            margin=s.box_head.margin, axis_name=axis_name,
        )
        return {"losses": terms | box_terms, "monitor": monitor}

    def _branch_weights(self) -> list[dict[str, float]]:
        """Weights of the box heads' losses by name, for each branch."""
        s = self.settings
        if not s.split_after:
            return [dict(s.loss_weights)]

        def lowered(of_class):
            return {
                name: weight * (s.low_weight if name.endswith("class") == of_class else 1.0)
                for name, weight in s.loss_weights.items()
            }

        return [lowered(of_class=False), lowered(of_class=True)]

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Detections: boxes (B,D,4) canvas pixels, scores, classes 0..K-1 and valid, each (B,D)."""
        s = self.settings
        pyramids = self.pyramids(batch, train=False)
        proposals = self._propose(pyramids, batch)
        scores, boxes = self._score(pyramids, batch, proposals)
        valid = proposals.valid & batch["image_valid"][:, None]
        if s.drop_background_rois:
            # Stricter than the score threshold, for experts (paper section 5.4).
            valid &= scores.argmax(axis=-1) != 0

        def select(boxes, scores, valid):
            return multiclass_nms(boxes, scores, valid, **s.detections)

        return jax.vmap(select)(boxes, scores[..., 1:], valid)

    def propose_on(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Proposals of inference: boxes (B,P,4) canvas pixels, scores (B,P), valid (B,P)."""
        found = self._propose(self.pyramids(batch, train=False), batch)
        return {
            "boxes": found.boxes,
            "scores": jax.nn.sigmoid(found.logits),
            "valid": found.valid & batch["image_valid"][:, None],
        }

    def score_proposals(
        self, batch: Mapping[str, Array], boxes: Float[Array, "B P 4"], valid: Bool[Array, "B P"]
    ) -> dict[str, Array]:
        """The second stage on given regions, for test-time augmentation.

        Args:
          batch: images.
          boxes: regions, canvas pixels.
          valid: which of them are real.

        Returns:
          scores (B,P,K+1), probabilities with background first, and boxes (B,P,K,4) canvas pixels
          ((B,P,1,4) when class-agnostic).
        """
        pyramids = self.pyramids(batch, train=False)
        scores, boxes = self._score(pyramids, batch, rpn_ops.Proposals(boxes, valid))
        return {"scores": scores, "boxes": boxes}

    def _propose(
        self, pyramids: list[list[Array]], batch: Mapping[str, Array]
    ) -> rpn_ops.Proposals:
        logits, deltas = self.rpn_head(pyramids[-1])
        return rpn_ops.propose(
            logits, deltas, self.anchors(pyramids[-1]), batch["image_size"],
            **self.settings.rpn.test_proposals,
        )

    def _score(
        self, pyramids: list[list[Array]], batch: Mapping[str, Array], proposals: rpn_ops.Proposals
    ) -> tuple[Array, Array]:
        stages = self.settings.stages
        return second_stage.detect_stages(
            self.heads(), [self.pool(levels) for levels in pyramids], proposals,
            batch["image_size"], self.stages, average=stages.average, box_stage=stages.box_stage,
        )


def _check_choices(settings: ml_collections.FrozenConfigDict) -> None:
    for name, found, choices in (
        ("neck", settings.neck, NECKS),
        ("box_head.kind", settings.box_head.kind, HEADS),
        ("split_after", settings.split_after, SPLITS),
    ):
        if found not in choices:
            expected = ", ".join(map(repr, choices))
            raise UserError(f"config.model.{name}: found {found!r}, expected one of {expected}")


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
