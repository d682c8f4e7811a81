"""What two-stage models share: backbone, pyramids, and box heads that read RoIs of them.

With `split_after` the backbone forks after that tap (paper section 5.2): one branch for classes and
one for boxes, each with a pyramid and heads of its own.

Shape legend
  B     images of the global batch
  H, W  canvas, pixels
  R     RoIs per image

Batch fields used (common.data.input): image uint8 (B,H,W,3), image_size float32 (B,2) content
height and width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from common.data.frequencies import ClassFrequencies
from common.geometry.adaptive_roi_align import adaptive_roi_align
from common.geometry.deform_roi import deform_roi_align
from common.geometry.roi_align import roi_align
from common.nn.backbones import make_backbone, preprocessing
from common.nn.layers import norm
from common.nn.layers.canvas import normalise
from common.nn.parts import image_numbers
from common.tables.hierarchy import Ancestors
from detection.classifiers import make_classifier
from detection.losses.roi_class import ClassLosses, class_loss_labels
from detection.models.box_head import RegressorHead, TwoFCHead
from detection.models.decoupling_head import DecouplingHead
from detection.models.fpn import FPN
from detection.models.mask_branch import MaskBranch
from detection.models.mask_head import MaskHead
from detection.models.nas_fpn import NASFPN
from detection.models.second_stage import RoIBranch
from detection.models.settings import ModelSettings
from detection.structures import Pool

MAX_ROI_STRIDE = 32  # coarser levels serve the proposal network only


class Branch(NamedTuple):
    """Modules of one branch; a plain model has one, a decoupled backbone two.

    Attributes:
      backbone: stages above the fork, None where nothing is forked.
      neck: makes the pyramid.
      heads: box heads of each stage.
    """

    backbone: nn.Module | None
    neck: nn.Module
    heads: tuple[nn.Module, ...]


class TwoStage(nn.Module):
    """Backbone, pyramids and heads by `config.model`; subclasses say where proposals come from.

    Attributes:
      num_classes: K.
      settings: `config.model`.
      axis_name: device axis; None when the model sees the whole batch.
      frequencies: of the classes in the training photos, see `make_classifier`.
      ancestors: of each class, as `common.tables.hierarchy.ancestor_lists` gives them; None: the
        classes lie side by side.
    """

    num_classes: int
    settings: ModelSettings
    axis_name: str | None = None
    frequencies: ClassFrequencies | None = None
    ancestors: Ancestors | None = None

    def setup(self):
        s = self.settings
        self.classifier = make_classifier(
            s.box_head.classifier, self.num_classes, self.frequencies, self.ancestors
        )
        # Only training keeps what losses remember; inference and plain calls go without.
        keeps_state = self.is_mutable_collection("loss_state") and self.classifier.start_state()
        self.loss_states = {
            label: self.variable("loss_state", label, self.classifier.start_state)
            for label in (class_loss_labels(s) if keeps_state else ())
        }
        split = int(s.split_after[1:]) - 1 if s.split_after else None  # the last shared stage
        self.backbone = self._make_backbone(None if split is None else dict(last_stage=split))
        # The last branch serves boxes and proposals, the first one classes.
        names = ("",) if split is None else ("_class", "_box")
        self.branches = tuple(self._make_branch(name, split) for name in names)
        self.mask_heads = self._make_mask_heads()

    def _make_branch(self, name: str, split: int | None) -> Branch:
        """Names of the modules are those of the parameters: `neck_class`, `box_head_class2`."""
        upper = None
        if split is not None:
            upper = self._make_backbone(dict(first_stage=split + 1, name=f"backbone{name}"))
        # `box_head`, then `box_head2` and so on in a cascade.
        numbers = ["", *range(2, len(self.settings.stages.iou) + 1)]
        heads = tuple(self._make_head(f"box_head{name}{number}") for number in numbers)
        return Branch(upper, self._make_neck(f"neck{name}"), heads)

    def _make_backbone(self, part: dict | None) -> nn.Module:
        s = self.settings
        return make_backbone(
            s.backbone,
            norm=s.norm,
            frozen_stages=s.frozen_stages,
            remat=s.remat,
            axis_name=self.axis_name,
            dtype=jnp.dtype(s.dtype),
            drop_path_rate=s.drop_path_rate,
            deform=s.deform,
            **(part or {}),
        )

    def _make_neck(self, name: str) -> nn.Module:
        s = self.settings
        fields: dict[str, Any] = dict(axis_name=self.axis_name, dtype=jnp.dtype(s.dtype), name=name)
        if s.neck == "fpn":
            return FPN(s.fpn_channels, s.fpn_norm, **fields)
        return NASFPN(s.fpn_channels, **vars(s.nas_fpn), **fields)

    def _make_head(self, name: str) -> nn.Module:
        h, dtype = self.settings.box_head, jnp.dtype(self.settings.dtype)
        if h.kind == "regressor":
            return RegressorHead(h.width, dtype=dtype, name=name)
        fields: dict[str, Any] = dict(
            classifier=self.classifier,
            width=h.width,
            class_agnostic=h.class_agnostic,
            dtype=dtype,
            name=name,
        )
        if h.kind == "decoupling":
            return DecouplingHead(**vars(h.offsets), **fields)
        convs = h.convs if h.convs.count else None
        return TwoFCHead(num_fcs=h.num_fcs, convs=convs, axis_name=self.axis_name, **fields)

    def _make_mask_heads(self) -> tuple[MaskHead | None, ...]:
        """Of each stage: `mask_head` of the last one, or `mask_head`, `mask_head2` and so on."""
        s, count = self.settings.mask_head, len(self.settings.stages.iou)
        if s.kind == "none":
            return ()
        numbers = ["", *range(2, count + 1)] if s.stages == "all" else [None] * (count - 1) + [""]
        fields: dict[str, Any] = dict(
            num_masks=self.num_classes if s.kind == "class_specific" else 1,
            width=s.width,
            num_convs=s.num_convs,
            norm=s.norm,
            dtype=jnp.dtype(self.settings.dtype),
        )
        return tuple(
            None if number is None else MaskHead(**fields, name=f"mask_head{number}")
            for number in numbers
        )

    def read(self, batch: Mapping[str, Array], train: bool) -> list[RoIBranch]:
        """The features of the batch's images in each branch, with the heads that read them."""
        mean, std = preprocessing(self.settings.backbone)
        mean, std = self.settings.pixel_mean or mean, self.settings.pixel_std or std
        images = normalise(
            batch["image"], batch["image_size"], mean, std, jnp.dtype(self.settings.dtype)
        )
        shared = self.backbone(images, train=train)
        branches = []
        for branch in self.branches:
            taps = shared
            if branch.backbone is not None:
                taps = shared | branch.backbone(shared[self.settings.split_after], train=train)
            pyramid = branch.neck(taps, train)
            levels = [pyramid[name] for name in sorted(pyramid)]
            pool = self._pool(levels, self.settings.box_head.pool_size)
            branches.append(RoIBranch(levels, pool, branch.heads))
        if self.mask_heads:
            pool = self._pool(branches[-1].levels, self.settings.mask_head.pool_size)
            branches[-1] = branches[-1]._replace(masks=MaskBranch(pool, self.mask_heads))
        return branches

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of the five levels."""
        s = self.settings
        finest = s.nas_fpn.min_level if s.neck == "nas_fpn" else 2
        return tuple(2 ** (finest + i) for i in range(5))

    def _pool(self, levels: Sequence[Array], size: int) -> Pool:
        """Function of boxes (B,R,4), and optionally shifts of each bin, to (B,R,S,S,C) features.

        `size` is S. Each box is read from the level that fits its size.
        """
        h = self.settings.box_head
        strides = tuple(stride for stride in self.strides if stride <= MAX_ROI_STRIDE)
        levels = levels[: len(strides)]
        options = dict(output_size=size, sampling_ratio=h.sampling_ratio, aligned=h.aligned)

        def pooled(boxes, offsets=None):
            if not h.sampling_ratio:
                return adaptive_roi_align(
                    levels, boxes, strides, output_size=size, aligned=h.aligned
                )
            if offsets is None:
                return roi_align(levels, boxes, strides, **options)
            samples = {"centre": h.sampling_ratio, "edge": 4}[
                h.sample_mode
            ]  # edge: as the authors' code
            shifted = {**options, "sampling_ratio": samples, "sample_mode": h.sample_mode}
            return deform_roi_align(levels, boxes, offsets, strides, **shifted)

        return pooled

    def image_keys(self, num_images: int) -> Array:
        """A random key for each image, from the stream 'sampling'.

        What is drawn for an image depends on the stream's key, the same on all devices, and on the
        image's slot in the global batch, never on the number of devices.
        """
        slots = image_numbers(num_images, self.axis_name)
        return jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("sampling"), slots)

    def class_losses(self, read_only: bool = False) -> ClassLosses:
        """How the heads learn to classify in this step; takes a key of the stream 'sampling'.

        `read_only`: what losses keep between steps stays as it is.
        """
        # Making the parameters is no step.
        states = {} if self.is_initializing() else self.loss_states
        return ClassLosses(self.classifier, self.make_rng("sampling"), states, read_only)

    def losses(self, batch: Mapping[str, Array]) -> dict:
        """Of a training batch: {'losses': terms that are summed, 'monitor': figures to log}."""
        raise NotImplementedError

    def detect(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What inference gives, batch first."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Array], train: bool) -> dict:
        """`losses` (train) or `detect` (not train)."""
        return self.losses(batch) if train else self.detect(batch)


# A classifier of whole photos, whose losses are sums over classes: what it learns with at the start
# would leave a detector beside it a small part of the clipped step.
CLIPPED_APART = "weak_head/.*"


def frozen_pattern(settings: ModelSettings) -> str:
    """Regular expression of the paths of parameters that are not trained."""
    backbone = make_backbone(
        settings.backbone, norm=settings.norm, frozen_stages=settings.frozen_stages
    )
    patterns = [f"backbone(?:_class|_box)?/(?:{backbone.frozen_pattern()})"]
    norms = {
        "neck": settings.fpn_norm,
        "box_head": settings.box_head.convs.norm,
        "mask_head": settings.mask_head.norm,
    }
    patterns += [
        f"{module}[^/]*/(?:{norm.frozen_pattern([], kind)})"
        for module, kind in norms.items()
        if kind == "frozen"
    ]
    return "|".join(patterns)
