"""ResNet-18 to -152 (He et al. 2016), "pytorch style": the stride sits in the 3x3 convolution.

Shapes: B batch, H W input height and width, h w those of a block, C D channels in and out. NHWC.

Padding is explicit and symmetric as in torch, so that weights from torchvision and timm give the
same outputs. Parameter paths read `stem/conv/kernel`, `stage2/block0/conv1/kernel`,
`stage2/block0/downsample_norm/scale`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.conv import Conv
from common.nn.norm import Norm, frozen_pattern

# name -> (blocks per stage, bottleneck blocks)
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


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
        return nn.relu(y + _shortcut(self, x, y.shape, train))


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; output has 4 x `width` channels."""

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        y = self.conv(self.width, 1, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv(self.width, 3, self.stride, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.conv(4 * self.width, 1, padding=0, name="conv3")(y)
        y = self.norm(name="norm3")(y, train)
        return nn.relu(y + _shortcut(self, x, y.shape, train))


def _shortcut(block, x, out_shape, train):
    """Identity, or a strided 1x1 projection where shapes differ. Runs in the scope of `block`."""
    if x.shape == out_shape:
        return x
    x = block.conv(out_shape[-1], 1, block.stride, padding=0, name="downsample_conv")(x)
    return block.norm(name="downsample_norm")(x, train)


class Stem(nn.Module):
    """7x7 convolution of stride 2 and 3x3 max-pooling of stride 2."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 64"]:
        x = self.conv(64, 7, 2, padding=3, name="conv")(x)
        x = nn.relu(self.norm(name="norm")(x, train))
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


class ResNet(nn.Module):
    """Trunk without the classifier: taps c2..c5 at strides 4, 8, 16, 32.

    Attributes:
      network: a key of `RESNETS`.
      norm: kind of normalisation, see `common.nn.norm.Norm`.
      axis_name: device axis over which 'sync' norm averages, see `Norm`.
      frozen_stages: 0 trains everything, n >= 1 freezes the stem and the stages 1..n (running
        statistics, no gradient).
      remat: recompute each trained block in the backward pass instead of storing activations.
      dtype: of activations; parameters are float32.
    """

    network: str = "resnet50"
    norm: str = "frozen"
    axis_name: str | None = None
    frozen_stages: int = 0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> dict[str, Array]:
        """`images` normalised (see `common.nn.backbones.preprocessing`)."""
        depths, bottleneck = RESNETS[self.network]
        block_class = BottleneckBlock if bottleneck else BasicBlock
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            Norm, self.norm, axis_name=self.axis_name, epsilon=1e-5, dtype=self.dtype
        )

        frozen = self.frozen_stages >= 1
        x = Stem(conv, norm, name="stem")(images.astype(self.dtype), train and not frozen)
        taps = {}
        for i, depth in enumerate(depths):
            frozen = self.frozen_stages >= i + 1
            block = block_class
            if self.remat and not frozen:
                block = nn.remat(block_class, static_argnums=(2,))
            block = functools.partial(block, width=64 * 2**i, conv=conv, norm=norm)
            stage = Stage(block, depth, stride=1 if i == 0 else 2, name=f"stage{i + 1}")
            x = stage(x, train and not frozen)
            if frozen:
                x = jax.lax.stop_gradient(x)
            taps[f"c{i + 2}"] = x
        return taps

    def frozen_pattern(self) -> str:
        """Regex (for `re.fullmatch`) of the '/'-joined paths of parameters that never change."""
        stages = ["stem", *(f"stage{i + 1}" for i in range(self.frozen_stages))]
        return frozen_pattern(stages if self.frozen_stages else [], self.norm)
