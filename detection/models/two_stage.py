"""What two-stage models share: backbone, pyramids, and box heads that read regions of them.

With `split_after` the backbone forks after that tap (paper section 5.2): one branch for classes and
one for boxes, each with a pyramid and heads of its own.

Shape legend
  B     images of the global batch
  H, W  canvas, pixels
  R     regions

Batch fields used (common.data.input): image uint8 (B,H,W,3), image_size float32 (B,2) content
height and width.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from common.geometry.deform_roi import deform_roi_align
from common.geometry.roi_align import roi_align
from common.nn.backbones import make_backbone, preprocessing
from common.nn.layers.canvas import normalise
from detection.models import second_stage
from detection.models.box_head import RegressorHead, TwoFCHead
from detection.models.decoupling_head import DecouplingHead
from detection.models.fpn import FPN
from detection.models.nas_fpn import NASFPN
from detection.models.settings import ModelSettings

MAX_ROI_STRIDE = 32  # coarser levels serve the proposal network only


class TwoStage(nn.Module):
    """Backbone, pyramids and heads by `config.model`; subclasses say where regions come from."""

    num_classes: int
    settings: ModelSettings
    axis_name: str | None = None

    def setup(self):
        s = self.settings
        dtype = jnp.dtype(s.dtype)
        fields = dict(
            norm=s.norm,
            frozen_stages=s.frozen_stages,
            remat=s.remat,
            axis_name=self.axis_name,
            dtype=dtype,
            drop_path_rate=s.drop_path_rate,
            deform=s.deform,
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

    def _make_neck(self, dtype: jnp.dtype) -> nn.Module:
        s = self.settings
        if s.neck == "fpn":
            return FPN(s.fpn_channels, s.fpn_norm, axis_name=self.axis_name, dtype=dtype)
        return NASFPN(s.fpn_channels, axis_name=self.axis_name, dtype=dtype, **vars(s.nas_fpn))

    def _make_head(self, dtype: jnp.dtype) -> nn.Module:
        h = self.settings.box_head
        if h.kind == "regressor":
            return RegressorHead(h.width, dtype=dtype)
        fields = dict(
            num_classes=self.num_classes,
            width=h.width,
            class_agnostic=h.class_agnostic,
            dtype=dtype,
        )
        if h.kind == "decoupling":
            return DecouplingHead(**fields, **vars(h.offsets))
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

    def image_keys(self, num_images: int) -> Array:
        """A random key for each image, from the stream 'sampling'.

        What is drawn for an image depends on the stream's key, the same on all devices, and on the
        image's slot in the global batch, never on the number of devices.
        """
        slots = jnp.arange(num_images)
        if self.axis_name is not None:
            slots += jax.lax.axis_index(self.axis_name) * slots.size
        return jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("sampling"), slots)

    def losses(self, batch: Mapping[str, Array]) -> dict:
        """Of a training batch: {'losses': terms that are summed, 'monitor': figures to log}."""
        raise NotImplementedError

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What inference gives, batch first."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Array], train: bool) -> dict:
        """`losses` (train) or `detect` (not train)."""
        return self.losses(batch) if train else self.detect(batch)


def frozen_pattern(settings: ModelSettings) -> str:
    """Regular expression of the paths of parameters that are not trained."""
    backbone = make_backbone(
        settings.backbone, norm=settings.norm, frozen_stages=settings.frozen_stages
    )
    return f"backbone(?:_class|_box)?/(?:{backbone.frozen_pattern()})"
