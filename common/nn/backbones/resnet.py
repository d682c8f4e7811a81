"""ResNet-18 to -152 (He et al. 2016) and ResNeXt (Xie et al. 2017).

"Pytorch style": the stride sits in the 3x3 convolution, which ResNeXt splits into groups; in the
models of the authors, which detectron2 starts from (`_caffe`), in the 1x1 before. In c3, c4 and c5
the 3x3 convolution can be a deformable one (Dai et al. 2017, Zhu et al. 2019).

Shapes: B batch, H W input height and width, h w those of a block, C D channels in and out. NHWC.

Padding is explicit and symmetric as in torch, so that weights from torchvision and timm give the
same outputs. Parameter paths read `stem/conv/kernel`, `stage2/block0/conv1/kernel`,
`stage2/block0/downsample_norm/scale`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.io.errors import UserError
from common.nn.layers.conv import Conv
from common.nn.layers.deform_conv import DeformConv
from common.nn.layers.norm import Norm, frozen_pattern
from common.nn.xla_cpu.shortcut import relu_of_sum


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; output has `width` channels."""

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        y = self.conv(self.width, 3, self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv(self.width, 3, padding=1, name="conv2")(y)
        y = self.norm(name="norm2")(y, train)
        return relu_of_sum(y + shortcut(self, x, y.shape, train))


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; output has 4 x `width` channels.

    The blocks of `common.nn.backbones.senet` differ in what the methods below `__call__` return.

    Attributes:
      conv3x3: makes the middle convolution, ordinary or deformable.
      groups: of the middle convolution.
      base_width: channels of a group where `width` is 64.
    """

    width: int
    stride: int
    conv: Callable
    conv3x3: Callable
    norm: Callable
    groups: int = 1
    base_width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        (first, inner), (first_stride, stride) = self.widths(), self.strides()
        y = self.conv(first, 1, first_stride, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv3x3(inner, 3, stride, padding=1, groups=self.groups, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.conv(4 * self.width, 1, padding=0, name="conv3")(y)
        y = self.gate(self.norm(name="norm3")(y, train))
        return relu_of_sum(y + shortcut(self, x, y.shape, train, self.shortcut_kernel_size()))

    def widths(self) -> tuple[int, int]:
        """Output channels of the first two convolutions."""
        inner = self.width * self.base_width // 64 * self.groups
        return inner, inner

    def strides(self) -> tuple[int, int]:
        """Strides of the first two convolutions."""
        return 1, self.stride

    def shortcut_kernel_size(self) -> int:
        """Kernel side of the projection where the shapes of input and output differ."""
        return 1

    def gate(self, y: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """What is done to the branch before the shortcut is added."""
        return y


class CaffeBottleneckBlock(BottleneckBlock):
    """Bottleneck with its stride in the first convolution."""

    def strides(self) -> tuple[int, int]:
        return self.stride, 1


def shortcut(block, x, out_shape, train, kernel_size=1):
    """Identity, or a strided projection where shapes differ. Runs in the scope of `block`."""
    if x.shape == out_shape:
        return x
    x = block.conv(
        out_shape[-1], kernel_size, block.stride, padding=kernel_size // 2, name="downsample_conv"
    )(x)
    return block.norm(name="downsample_norm")(x, train)


class Stem(nn.Module):
    """7x7 convolution of stride 2 and 3x3 max-pooling of stride 2."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 64"]:
        x = self.conv(64, 7, 2, padding=3, name="conv")(x)
        return self.pool(nn.relu(self.norm(name="norm")(x, train)))

    def pool(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class Stage(nn.Module):
    """A run of blocks; the first one changes stride and width."""

    block: Callable
    num_blocks: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        for i in range(self.num_blocks):
            x = self.block(stride=self.stride if i == 0 else 1, name=f"block{i}")(x, train)
        return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """What tells the networks of this family apart (`common.nn.backbones.senet` has more of them).

    Attributes:
      depths: blocks of the stages 1..4.
      block: class of the blocks.
      stem: class of what leads to stride 4.
      groups: of the 3x3 convolutions of bottlenecks (ResNeXt's cardinality).
      base_width: channels of a group in stage 1.
      width: of the blocks of stage 1; doubles with each stage.
    """

    depths: tuple[int, int, int, int]
    block: type[nn.Module] = BottleneckBlock
    stem: type[nn.Module] = Stem
    groups: int = 1
    base_width: int = 64
    width: int = 64


RESNETS = {
    "resnet10": Layout((1, 1, 1, 1), BasicBlock),  # no public weights; for tests
    "resnet18": Layout((2, 2, 2, 2), BasicBlock),
    "resnet34": Layout((3, 4, 6, 3), BasicBlock),
    "resnet50": Layout((3, 4, 6, 3)),
    "resnet101": Layout((3, 4, 23, 3)),
    "resnet152": Layout((3, 8, 36, 3)),
    "resnet50_caffe": Layout((3, 4, 6, 3), CaffeBottleneckBlock),
    "resnet101_caffe": Layout((3, 4, 23, 3), CaffeBottleneckBlock),
    "resnext50_32x4d": Layout((3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x4d": Layout((3, 4, 23, 3), groups=32, base_width=4),
    "resnext101_32x8d": Layout((3, 4, 23, 3), groups=32, base_width=8),
    "resnext101_64x4d": Layout((3, 4, 23, 3), groups=64, base_width=4),
    "resnext152_32x8d": Layout((3, 8, 36, 3), groups=32, base_width=8),
}


class ResNet(nn.Module):
    """Trunk without the classifier: taps c2..c5 at strides 4, 8, 16, 32.

    Attributes:
      layout: of the network.
      norm: kind of normalisation, see `common.nn.layers.norm.Norm`.
      axis_name: device axis over which 'sync' norm averages, see `Norm`.
      frozen_stages: 0 trains everything, n >= 1 freezes the stem and the stages 1..n (running
        statistics, no gradient).
      deform: versions of the deformable convolutions in c3, c4, c5; 0: ordinary ones.
      remat: recompute each trained block in the backward pass instead of storing activations.
      first_stage: n > 1 leaves the stem and the stages before n out; the input is tap c(n).
      last_stage: n < 4 leaves out the stages after n.
      dtype: of activations; parameters are float32.
    """

    layout: Layout
    norm: str = "frozen"
    axis_name: str | None = None
    frozen_stages: int = 0
    deform: tuple[int, int, int] = (0, 0, 0)
    remat: bool = False
    first_stage: int = 1
    last_stage: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> dict[str, Array]:
        """`x`: images, normalised (see `common.nn.backbones.preprocessing`), or the tap before."""
        layout = self.layout
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            Norm, self.norm, axis_name=self.axis_name, epsilon=1e-5, dtype=self.dtype
        )
        x = x.astype(self.dtype)
        if self.first_stage == 1:
            x = layout.stem(conv, norm, name="stem")(x, train and not self.frozen_stages)
        taps = {}
        for i in range(self.first_stage, self.last_stage + 1):
            frozen = i <= self.frozen_stages
            block_class = layout.block
            if self.remat and not frozen:
                block_class = nn.remat(block_class, static_argnums=(2,))
            block = functools.partial(
                block_class,
                width=layout.width * 2 ** (i - 1),
                conv=conv,
                norm=norm,
                **self._options(i),
            )
            stage = Stage(block, layout.depths[i - 1], stride=1 if i == 1 else 2, name=f"stage{i}")
            x = stage(x, train and not frozen)
            if frozen:
                x = jax.lax.stop_gradient(x)
            taps[f"c{i + 1}"] = x
        return taps

    def _options(self, stage: int) -> dict[str, Any]:
        """Fields that the blocks of a stage have if they are bottlenecks."""
        if len(self.deform) != 3 or any(version not in (0, 1, 2) for version in self.deform):
            raise UserError(f"deform: found {self.deform}, expected 0, 1 or 2 for c3, c4 and c5")
        version = (0, *self.deform)[stage - 1]
        if self.layout.block is BasicBlock:
            if version:
                raise UserError(f"deform: found {self.deform}, expected (0, 0, 0) for basic blocks")
            return {}
        conv3x3: Callable = functools.partial(Conv, dtype=self.dtype)
        if version:
            conv3x3 = functools.partial(DeformConv, version=version, dtype=self.dtype)
        return {
            "conv3x3": conv3x3,
            "groups": self.layout.groups,
            "base_width": self.layout.base_width,
        }

    def frozen_pattern(self) -> str:
        """Regex (for `re.fullmatch`) of the '/'-joined paths of parameters that never change."""
        stages = ["stem", *(f"stage{i + 1}" for i in range(self.frozen_stages))]
        return frozen_pattern(stages if self.frozen_stages else [], self.norm)
