"""SENet-154, SE-ResNet and SE-ResNeXt (Hu et al. 2018) in the layouts of the authors' Caffe models.

They are ResNets (`common.nn.backbones.resnet.ResNet`) with other blocks and stems, which differ in
where the stride sits. Parameter paths read `stage2/block0/conv1/kernel` and
`stage2/block0/se_reduce/bias`.

Shapes: B batch, H W input height and width, h w those of a block, C D channels in and out. NHWC.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.backbones.resnet import Layout, shortcut
from common.nn.xla_cpu.shortcut import relu_of_sum

_REDUCTION = 16  # channels of a block over those of its squeeze


class SENetBlock(nn.Module):
    """SENet-154's bottleneck: 2 x and 4 x `width` channels before and after the grouped 3x3.

    Strides in the 3x3 convolution; projects the shortcut by a 3x3 convolution where it strides.
    Fields as `common.nn.backbones.resnet.BottleneckBlock`.
    """

    width: int
    stride: int
    conv: Callable
    conv3x3: Callable
    norm: Callable
    groups: int = 64
    base_width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        y = self.conv(2 * self.width, 1, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv3x3(
            4 * self.width, 3, self.stride, padding=1, groups=self.groups, name="conv2"
        )(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.conv(4 * self.width, 1, padding=0, name="conv3")(y)
        y = self.norm(name="norm3")(y, train)
        y = squeeze_excite(self, y)
        kernel_size = 3 if self.stride > 1 else 1
        return relu_of_sum(y + shortcut(self, x, y.shape, train, kernel_size))


class SEBottleneckBlock(nn.Module):
    """Bottleneck of SE-ResNet (`groups` 1, strides in its first convolution) and SE-ResNeXt
    (strides in the grouped 3x3 one). Fields as `common.nn.backbones.resnet.BottleneckBlock`."""

    width: int
    stride: int
    conv: Callable
    conv3x3: Callable
    norm: Callable
    groups: int = 1
    base_width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        inner = self.width * self.base_width // 64 * self.groups
        first, second = (self.stride, 1) if self.groups == 1 else (1, self.stride)
        y = self.conv(inner, 1, first, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv3x3(inner, 3, second, padding=1, groups=self.groups, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.conv(4 * self.width, 1, padding=0, name="conv3")(y)
        y = self.norm(name="norm3")(y, train)
        y = squeeze_excite(self, y)
        return relu_of_sum(y + shortcut(self, x, y.shape, train))


def squeeze_excite(block, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    """Weighs channels by a function of their means. Runs in the scope of `block`."""
    squeezed = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
    channels = x.shape[-1]
    gate = block.conv(channels // _REDUCTION, 1, use_bias=True, name="se_reduce")(squeezed)
    gate = block.conv(channels, 1, use_bias=True, name="se_expand")(nn.relu(gate))
    return x * nn.sigmoid(gate)


class SEStem(nn.Module):
    """7x7 convolution of stride 2 and Caffe's max-pooling."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 64"]:
        x = self.conv(64, 7, 2, padding=3, name="conv")(x)
        return caffe_max_pool(nn.relu(self.norm(name="norm")(x, train)))


class SENetStem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and Caffe's max-pooling."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 128"]:
        for i, (features, stride) in enumerate(((64, 2), (64, 1), (128, 1)), start=1):
            x = self.conv(features, 3, stride, padding=1, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x, train))
        return caffe_max_pool(x)


def caffe_max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """3x3, stride 2, no row above; a last window may reach over the edge (torch's ceil_mode)."""
    padding = tuple((0, (side - 3) % 2) for side in x.shape[1:3])
    return nn.max_pool(x, (3, 3), (2, 2), padding=padding)


SENETS = {
    "seresnet50": Layout((3, 4, 6, 3), SEBottleneckBlock, SEStem),
    "seresnet101": Layout((3, 4, 23, 3), SEBottleneckBlock, SEStem),
    "seresnet152": Layout((3, 8, 36, 3), SEBottleneckBlock, SEStem),
    "seresnext50_32x4d": Layout((3, 4, 6, 3), SEBottleneckBlock, SEStem, 32, 4),
    "seresnext101_32x4d": Layout((3, 4, 23, 3), SEBottleneckBlock, SEStem, 32, 4),
    "senet154": Layout((3, 8, 36, 3), SENetBlock, SENetStem, groups=64),
}
