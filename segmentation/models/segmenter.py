"""Foreground against background inside a box: HRNet trunk and the HRNetV2 head (paper 8.2).

Shapes: B crops of this device, H W canvas, h w a quarter of it, C width of the trunk, K classes
(1 where the network does not look at the class).

The head of Sun et al. 2019 brings all four branches to stride 4, concatenates them to 15C channels
and applies a 1x1 convolution 15C -> 15C with bias, norm, ReLU, and a 1x1 convolution to two logits.
Here the first convolution runs on each branch before it is enlarged: both are linear, a bilinear
interpolation acts on each channel alone, and the order does not change the sum, but takes an
eighth of the multiplications. Likewise only the difference of the two logits is enlarged to the
canvas: softmax over two classes depends on nothing else.

Parameter paths: `backbone/...` as in `common.nn.backbones.hrnet`, `head/mix/kernel`,
`head/norm/scale`, `head/logits/kernel` (1, 1, 15C, 2K) with background in the even columns.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common.nn.backbones import make_backbone, preprocessing
from common.nn.backbones.hrnet import HRNETS, Layout, upsample
from common.nn.layers.canvas import content, normalise
from common.nn.layers.conv import conv2d, he_normal_fan_out
from common.nn.layers.norm import Norm
from common.nn.parts import sum_over_batch
from segmentation.losses import pixel_losses
from segmentation.settings import ModelSettings

NUM_LOGITS = 2  # background, foreground


class MixedBranches(nn.Module):
    """The 1x1 convolution with bias of all branches brought to the finest and concatenated."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, branches: list[Float[Array, "B _h _w _c"]]) -> Float[Array, "B h w D"]:
        widths = [x.shape[-1] for x in branches]
        width = sum(widths)
        kernel = self.param("kernel", he_normal_fan_out(), (1, 1, width, width))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        size = (branches[0].shape[1], branches[0].shape[2])
        total, start = bias.astype(self.dtype), 0
        for i, x in enumerate(branches):
            part = kernel[:, :, start : start + x.shape[-1]].astype(self.dtype)
            mixed = conv2d(x.astype(self.dtype), part)
            total = total + (upsample(mixed, size, 2**i, "bilinear") if i else mixed)
            start += x.shape[-1]
        return total


class ClassLogits(nn.Module):
    """Difference foreground minus background of the two logits of each crop's class."""

    num_classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w D"], classes: Int[Array, " B"]
    ) -> Float[Array, "B h w"]:
        outputs = NUM_LOGITS * self.num_classes
        init = nn.initializers.normal(0.001)
        kernel = self.param("kernel", init, (1, 1, x.shape[-1], outputs))
        bias = self.param("bias", nn.initializers.zeros_init(), (outputs,))
        weights = kernel.reshape(-1, self.num_classes, NUM_LOGITS)
        offsets = bias.reshape(self.num_classes, NUM_LOGITS)
        weights, offsets = weights[..., 1] - weights[..., 0], offsets[:, 1] - offsets[:, 0]
        if self.num_classes == 1:
            equation, weights, offsets = "bhwd,d->bhw", weights[:, 0], offsets[0]
        else:
            classes = jnp.clip(classes, 0, self.num_classes - 1)  # empty slots have class -1
            equation, weights = "bhwd,db->bhw", weights[:, classes]
            offsets = offsets[classes][:, None, None]
        logits = jnp.einsum(
            equation, x, weights.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return logits + offsets


class Head(nn.Module):
    """Four branches to the difference of the two logits at stride 4."""

    num_classes: int
    norm: str
    axis_name: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, branches: list[Array], classes: Int[Array, " B"], train: bool
    ) -> Float[Array, "B h w"]:
        x = MixedBranches(self.dtype, name="mix")(branches)
        norm = Norm(self.norm, axis_name=self.axis_name, dtype=self.dtype, name="norm")
        return ClassLogits(self.num_classes, name="logits")(nn.relu(norm(x, train)), classes)


class Segmenter(nn.Module):
    """Segments the object that a crop is centred on.

    Attributes:
      num_classes: K; 1: one pair of logits for all classes.
      backbone_name: one of `common.nn.backbones.BACKBONES`. The paper's are HRNets; of any other
        the head takes the taps c2 to c5.
      layout: of a smaller variant of it, or None.
      upsampling: in HRNet's exchange units, 'bilinear' (the authors' segmentation) or 'nearest'.
      norm, remat, dtype, axis_name: see `common.nn.backbones.hrnet.HRNet`.
    """

    num_classes: int
    backbone_name: str
    layout: Layout | None = None
    upsampling: str = "bilinear"
    norm: str = "sync"
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    def setup(self):
        fields = {"layout": self.layout} if self.layout else {}
        if self.backbone_name in HRNETS:
            fields["upsampling"] = self.upsampling
        self.backbone = make_backbone(
            self.backbone_name,
            norm=self.norm,
            remat=self.remat,
            axis_name=self.axis_name,
            dtype=self.dtype,
            **fields,
        )
        self.head = Head(self.num_classes, self.norm, self.axis_name, self.dtype)

    def __call__(self, batch: Mapping[str, Array], train: bool) -> dict:
        """Losses of a training batch, or logits.

        Args:
          batch: image uint8 (B, H, W, 3), image_size (B, 2) of the content, image_valid (B,),
            classes (B,); in training also mask (B, H, W), 1 foreground, and, where only a part of
            the content is known, mask_valid (B, H, W).
          train: also whether norm statistics are those of the batch.

        Returns:
          in training {'losses': {'mask'}, 'monitor': {'pixel_accuracy', 'foreground_iou'}}, this
          device's share of the figures of all crops: the loss is the mean over all known pixels;
          else {'logits': (B, H, W)}, foreground minus background, float32.
        """
        logits = self.logits(batch, train)
        if not train:
            return {"logits": logits}
        known = known_pixels(batch)
        sums = pixel_losses(logits, batch["mask"], known)
        totals = {name: value.sum() for name, value in sums.items()}
        everywhere = sum_over_batch(totals, self.axis_name)
        pixels = jnp.maximum(everywhere["pixels"], 1.0)
        return {
            "losses": {"mask": totals["loss"] / pixels},
            "monitor": {
                "pixel_accuracy": totals["correct"] / pixels,
                "foreground_iou": totals["intersection"] / jnp.maximum(everywhere["union"], 1.0),
            },
        }

    def logits(self, batch: Mapping[str, Array], train: bool) -> Float[Array, "B H W"]:
        mean, std = preprocessing(self.backbone_name)
        images = normalise(batch["image"], batch["image_size"], mean, std, self.dtype)
        taps = self.backbone(images, train)
        branches = [taps[name] for name in sorted(taps)]
        quarter = self.head(branches, batch["classes"], train)
        return jax.image.resize(quarter, images.shape[:3], "bilinear", antialias=False)


def known_pixels(batch: Mapping[str, Array]) -> Array:
    """(B, H, W) pixels of real crops that lie in the content and whose truth is known."""
    _, height, width = batch["mask"].shape
    known = content((height, width), batch["image_size"])
    known &= batch["image_valid"][:, None, None]
    return known & batch["mask_valid"] if "mask_valid" in batch else known


def build(settings: ModelSettings, num_classes: int, axis_name: str | None) -> Segmenter:
    """The network of `config.model` for a dataset with `num_classes` classes."""
    return Segmenter(
        num_classes if settings.class_specific else 1,
        settings.backbone,
        layout=settings.layout,
        upsampling=settings.upsampling,
        norm=settings.norm,
        remat=settings.remat,
        dtype=jnp.dtype(settings.dtype),
        axis_name=axis_name,
    )
