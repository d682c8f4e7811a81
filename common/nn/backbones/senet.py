"""SENet-154, SE-ResNet and SE-ResNeXt (Hu et al. 2018) in the layouts of the authors' Caffe models.

They are ResNets (`common.nn.backbones.resnet.ResNet`) with other blocks and stems, which differ in
where the stride sits. Parameter paths read `stage2/block0/conv1/kernel` and
`stage2/block0/se_reduce/bias`.

Shapes: B batch, H W input height and width, h w those of a block, C D channels in and out. NHWC.
"""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.backbones.resnet import BottleneckBlock, Layout, Stem
from common.nn.layers.squeeze_excite import squeeze_excite

_REDUCTION = 16  # channels of a block over those of its squeeze


class SEBottleneckBlock(BottleneckBlock):
    """Bottleneck of SE-ResNet (`groups` 1, strides in its first convolution) and SE-ResNeXt
    (strides in the grouped 3x3 one)."""

    def strides(self) -> tuple[int, int]:
        return (self.stride, 1) if self.groups == 1 else (1, self.stride)

    def gate(self, y: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        return squeeze_excite(self.conv, y, y.shape[-1] // _REDUCTION, nn.relu)


class SENetBlock(SEBottleneckBlock):
    """SENet-154's bottleneck: 2 x and 4 x `width` channels before and after the grouped 3x3.

    Strides in the 3x3 convolution; projects the shortcut by a 3x3 convolution where it strides.
    """

    def widths(self) -> tuple[int, int]:
        return 2 * self.width, 4 * self.width

    def shortcut_kernel_size(self) -> int:
        return 3 if self.stride > 1 else 1


class SEStem(Stem):
    """7x7 convolution of stride 2 and Caffe's max-pooling."""

    def pool(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return caffe_max_pool(x)


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
