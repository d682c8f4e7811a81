"""EfficientNet-B0..B7 (Tan & Le 2019) and -Lite0..Lite4, with TensorFlow padding and epsilon.

Shapes: B batch, H W input height and width, h w those of a block, C D channels in and out, E those
of the expanded block. NHWC.

The lite ones have no squeeze-and-excitation, ReLU6 in place of swish, a stem of one width and a
first and a last stage of one depth for all. The 1280-channel classification head is left out.
Parameter paths read `stage3/block0/expand_conv/kernel`, `stage3/block0/depthwise_norm/scale`,
`stage3/block0/se_reduce/bias`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.layers.conv import Conv
from common.nn.layers.norm import Norm, frozen_pattern
from common.nn.layers.squeeze_excite import squeeze_excite
from common.nn.parts import image_numbers

# name -> (width multiplier, depth multiplier)
EFFICIENTNETS = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
    "efficientnet_b0": (1.0, 1.0),
    "efficientnet_b1": (1.0, 1.1),
    "efficientnet_b2": (1.1, 1.2),
    "efficientnet_b3": (1.2, 1.4),
    "efficientnet_b4": (1.4, 1.8),
    "efficientnet_b5": (1.6, 2.2),
    "efficientnet_b6": (1.8, 2.6),
    "efficientnet_b7": (2.0, 3.1),
}

# (blocks, kernel size, stride, expansion, output channels) of B0's stages 1..7
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Stages after which the resolution is about to halve (and the last one) are the taps.
_TAPS = {2: "c2", 3: "c3", 5: "c4", 7: "c5"}


def scale_width(channels: int, multiplier: float) -> int:
    """Scaled channel count, rounded to a multiple of 8 and never below 90 % of the exact value."""
    exact = channels * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def stage_repeats(network: str) -> list[int]:
    """Number of blocks in each of the stages 1..7."""
    _, depth = EFFICIENTNETS[network]
    repeats = [math.ceil(depth * blocks) for blocks, *_ in _STAGES]
    if "lite" in network:
        repeats[0], repeats[-1] = _STAGES[0][0], _STAGES[-1][0]
    return repeats


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole images.

    Image i of the global batch draws from the key folded with i, so the draw does not depend on how
    the batch is split over the devices of `axis_name`. Uses the rng stream 'dropout'.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B h w C"]:
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        key = self.make_rng("dropout")
        draw = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), keep))
        slots = image_numbers(x.shape[0], self.axis_name)
        kept = draw(slots)[:, None, None, None]
        return jnp.where(kept, x / keep, 0.0).astype(x.dtype)


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, squeeze-excite, 1x1 projection.

    Attributes:
      se_features: width of the squeeze; 0 leaves squeeze-and-excitation out.
      drop_path_rate: probability of dropping the branch in training.
    """

    features: int
    kernel_size: int
    stride: int
    expansion: int
    se_features: int
    drop_path_rate: float
    activation: Callable
    conv: Callable
    norm: Callable
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        y, expanded = x, x.shape[-1] * self.expansion
        if self.expansion != 1:
            y = self.conv(expanded, 1, name="expand_conv")(y)
            y = self.activation(self.norm(name="expand_norm")(y, train))
        y = self.conv(
            expanded, self.kernel_size, self.stride, groups=expanded, name="depthwise_conv"
        )(y)
        y = self.activation(self.norm(name="depthwise_norm")(y, train))
        if self.se_features:
            y = squeeze_excite(self.conv, y, self.se_features, self.activation)
        y = self.conv(self.features, 1, name="project_conv")(y)
        y = self.norm(name="project_norm")(y, train)
        if y.shape == x.shape and self.stride == 1:
            y = x + DropPath(self.drop_path_rate, self.axis_name, name="drop_path")(y, train)
        return y


class Stem(nn.Module):
    """3x3 convolution of stride 2."""

    features: int
    activation: Callable
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w C"]:
        x = self.conv(self.features, 3, 2, name="conv")(x)
        return self.activation(self.norm(name="norm")(x, train))


class Stage(nn.Module):
    """Blocks of one width; the first one strides. `drop_path_rates` has one entry a block."""

    block: Callable
    se_ratio: float
    stride: int
    drop_path_rates: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w D"]:
        for i, rate in enumerate(self.drop_path_rates):
            # The squeeze is a share of the block's input channels, not of the expanded ones.
            se_features = max(1, int(x.shape[-1] * self.se_ratio)) if self.se_ratio else 0
            x = self.block(
                stride=self.stride if i == 0 else 1,
                se_features=se_features,
                drop_path_rate=rate,
                name=f"block{i}",
            )(x, train)
        return x


class EfficientNet(nn.Module):
    """Trunk without the head: taps c2..c5 (B0: 24, 40, 112, 320 channels) at strides 4..32.

    Attributes:
      network: a key of `EFFICIENTNETS`.
      norm: kind of normalisation, see `common.nn.layers.norm.Norm`.
      axis_name: device axis over which 'sync' norm averages, see `Norm`.
      frozen_stages: 0 trains everything, n >= 1 freezes what leads to the taps c2..c(n+1): 1 the
        stem and stages 1-2, 2 also stage 3, 3 also stages 4-5, 4 all.
      remat: recompute each trained block in the backward pass instead of storing activations.
      drop_path_rate: of the last block; grows linearly from 0 at the first (needs the rng stream
        'dropout' in training unless 0).
      dtype: of activations; parameters are float32.
    """

    network: str = "efficientnet_b0"
    norm: str = "frozen"
    axis_name: str | None = None
    frozen_stages: int = 0
    remat: bool = False
    drop_path_rate: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> dict[str, Array]:
        """`images` normalised (see `common.nn.backbones.preprocessing`)."""
        width, _ = EFFICIENTNETS[self.network]
        lite = "lite" in self.network
        activation = nn.relu6 if lite else nn.swish
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            Norm, self.norm, axis_name=self.axis_name, epsilon=1e-3, momentum=0.99, dtype=self.dtype
        )
        repeats = stage_repeats(self.network)
        rates = [self.drop_path_rate * i / sum(repeats) for i in range(sum(repeats))]

        frozen = self._frozen_trunk_stages()
        stem_features = 32 if lite else scale_width(32, width)
        stem = Stem(stem_features, activation, conv, norm, name="stem")
        x = stem(images.astype(self.dtype), train and not frozen)
        taps = {}
        for i, (_, kernel_size, stride, expansion, channels) in enumerate(_STAGES, start=1):
            is_frozen = i <= frozen
            block_class = MBConv
            if self.remat and not is_frozen:
                block_class = nn.remat(MBConv, static_argnums=(2,))
            block = functools.partial(
                block_class,
                features=scale_width(channels, width),
                kernel_size=kernel_size,
                expansion=expansion,
                activation=activation,
                conv=conv,
                norm=norm,
                axis_name=self.axis_name,
            )
            first = sum(repeats[: i - 1])
            x = Stage(
                block,
                se_ratio=0.0 if lite else 0.25,
                stride=stride,
                drop_path_rates=tuple(rates[first : first + repeats[i - 1]]),
                name=f"stage{i}",
            )(x, train and not is_frozen)
            if is_frozen:
                x = jax.lax.stop_gradient(x)
            if i in _TAPS:
                taps[_TAPS[i]] = x
        return taps

    def frozen_pattern(self) -> str:
        """Regex (for `re.fullmatch`) of the '/'-joined paths of parameters that never change."""
        last = self._frozen_trunk_stages()
        stages = ["stem", *(f"stage{i}" for i in range(1, last + 1))] if last else []
        return frozen_pattern(stages, self.norm)

    def _frozen_trunk_stages(self) -> int:
        return (0, *_TAPS)[min(self.frozen_stages, len(_TAPS))] if self.frozen_stages > 0 else 0
