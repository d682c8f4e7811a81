"""HRNetV2 trunk (Sun et al. 2019): four resolutions side by side, exchanged again and again.

Shapes: B batch, H W input height and width, h w those of a branch, C D channels in and out. NHWC.
Branch i = 0..3 has stride 4 * 2^i and `width` * 2^i channels.

Parameter paths read `stem/conv1/kernel`, `stage1/block0/conv1/kernel`,
`transition2/branch2_conv/kernel`, `stage3/module0/branch1/block0/norm1/scale`, and in the exchange
from branch j to branch i `stage3/module0/fuse/from2_to0_conv/kernel` or, one step after the other,
`stage3/module0/fuse/from0_to2_down0_conv/kernel`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.io.errors import UserError
from common.nn.backbones.resnet import BasicBlock, BottleneckBlock, Stage
from common.nn.layers.conv import Conv
from common.nn.layers.enlarge import enlarge
from common.nn.layers.norm import Norm, frozen_pattern
from common.nn.xla_cpu.shortcut import relu_of_sum


@dataclasses.dataclass(frozen=True)
class Layout:
    """What tells the networks apart.

    Attributes:
      width: C, channels of the branch of stride 4.
      modules: of the stages 2, 3, 4, which have 2, 3, 4 branches.
      blocks: of stage 1, and of each branch of a module.
    """

    width: int
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4


HRNETS = {"hrnet_w18": Layout(18), "hrnet_w32": Layout(32), "hrnet_w48": Layout(48)}
UPSAMPLINGS = ("nearest", "bilinear")


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 64"]:
        for i in (1, 2):
            x = self.conv(64, 3, 2, padding=1, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x, train))
        return x


class Transition(nn.Module):
    """Feature maps of one stage to those of the next, which has one branch more.

    A branch whose width stays passes through; the new one comes from the coarsest so far.
    """

    widths: tuple[int, ...]
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, xs: Sequence[Array], train: bool) -> list[Array]:
        outputs = []
        for i, width in enumerate(self.widths):
            is_new = i == len(xs)
            x = xs[-1] if is_new else xs[i]
            if is_new or x.shape[-1] != width:
                stride = 2 if is_new else 1
                x = self.conv(width, 3, stride, padding=1, name=f"branch{i}_conv")(x)
                x = nn.relu(self.norm(name=f"branch{i}_norm")(x, train))
            outputs.append(x)
        return outputs


class Fuse(nn.Module):
    """Each output is the sum of all branches, brought to its resolution and width."""

    conv: Callable
    norm: Callable
    upsampling: str

    @nn.compact
    def __call__(self, xs: Sequence[Array], train: bool) -> list[Array]:
        outputs = []
        for i, target in enumerate(xs):
            terms = [self._bring(x, j, i, target.shape, train) for j, x in enumerate(xs)]
            outputs.append(relu_of_sum(sum(terms[1:], start=terms[0])))
        return outputs

    def _bring(self, x, j, i, shape, train):
        """Branch j to `shape`, that of branch i."""
        name = f"from{j}_to{i}"
        if j > i:
            x = self.conv(shape[-1], 1, padding=0, name=f"{name}_conv")(x)
            x = self.norm(name=f"{name}_norm")(x, train)
            return upsample(x, shape[1:3], 2 ** (j - i), self.upsampling)
        for k in range(i - j):
            last = k == i - j - 1
            width = shape[-1] if last else x.shape[-1]
            x = self.conv(width, 3, 2, padding=1, name=f"{name}_down{k}_conv")(x)
            x = self.norm(name=f"{name}_down{k}_norm")(x, train)
            x = x if last else nn.relu(x)
        return x


def upsample(
    x: Float[Array, "B h w C"], size: tuple[int, ...], factor: int, method: str
) -> Float[Array, "B H W C"]:
    """'nearest': each cell `factor` x `factor` times, cut to `size`. 'bilinear': resized to `size`
    with half-pixel centres (`align_corners=False`)."""
    if method == "bilinear":
        if size == (factor * x.shape[1], factor * x.shape[2]):
            return enlarge(x, factor)
        shape = (x.shape[0], *size, x.shape[-1])
        return jax.image.resize(x, shape, "bilinear", antialias=False)
    batch, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, factor, w, factor, channels))
    return x.reshape(batch, h * factor, w * factor, channels)[:, : size[0], : size[1]]


class HRModule(nn.Module):
    """`blocks` basic blocks on each branch, then the exchange."""

    blocks: int
    conv: Callable
    norm: Callable
    upsampling: str

    @nn.compact
    def __call__(self, xs: Sequence[Array], train: bool) -> list[Array]:
        branches = []
        for i, x in enumerate(xs):
            block = functools.partial(BasicBlock, width=x.shape[-1], conv=self.conv, norm=self.norm)
            branches.append(Stage(block, self.blocks, stride=1, name=f"branch{i}")(x, train))
        return Fuse(self.conv, self.norm, self.upsampling, name="fuse")(branches, train)


class HRStage(nn.Module):
    """Modules one after the other."""

    module: Callable
    num_modules: int

    @nn.compact
    def __call__(self, xs: Sequence[Array], train: bool) -> Sequence[Array]:
        for i in range(self.num_modules):
            xs = self.module(name=f"module{i}")(xs, train)
        return xs


class HRNet(nn.Module):
    """Trunk without a head: the four branches after stage 4 as taps c2..c5, strides 4 to 32.

    Attributes:
      layout: of the network; c2..c5 have C, 2C, 4C, 8C channels.
      upsampling: of the exchange: 'nearest' as the published ImageNet weights were trained with,
        'bilinear' as the authors' segmentation networks.
      norm: kind of normalisation, see `common.nn.layers.norm.Norm`.
      axis_name: device axis over which 'sync' norm averages, see `Norm`.
      frozen_stages: 0 trains everything, n >= 1 freezes the stem and the stages 1..n with the
        transitions into them.
      remat: recompute each trained module (block of stage 1) in the backward pass instead of
        storing activations.
      dtype: of activations; parameters are float32.
    """

    layout: Layout
    upsampling: str = "nearest"
    norm: str = "frozen"
    axis_name: str | None = None
    frozen_stages: int = 0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> dict[str, Array]:
        """`images` normalised (see `common.nn.backbones.preprocessing`)."""
        if self.upsampling not in UPSAMPLINGS:
            raise UserError(
                f"upsampling: found {self.upsampling!r}, expected one of {', '.join(UPSAMPLINGS)}"
            )
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            Norm, self.norm, axis_name=self.axis_name, epsilon=1e-5, dtype=self.dtype
        )
        frozen = self.frozen_stages >= 1
        x = Stem(conv, norm, name="stem")(images.astype(self.dtype), train and not frozen)
        block = functools.partial(
            self._stored(BottleneckBlock, frozen), width=64, conv=conv, conv3x3=conv, norm=norm
        )
        stage1 = Stage(block, self.layout.blocks, stride=1, name="stage1")
        xs: Sequence[Array] = [stage1(x, train and not frozen)]
        if frozen:
            xs = jax.lax.stop_gradient(xs)
        for i in (2, 3, 4):
            frozen = self.frozen_stages >= i
            widths = tuple(self.layout.width * 2**branch for branch in range(i))
            transition = Transition(widths, conv, norm, name=f"transition{i - 1}")
            xs = transition(xs, train and not frozen)
            module = functools.partial(
                self._stored(HRModule, frozen),
                blocks=self.layout.blocks,
                conv=conv,
                norm=norm,
                upsampling=self.upsampling,
            )
            stage = HRStage(module, self.layout.modules[i - 2], name=f"stage{i}")
            xs = stage(xs, train and not frozen)
            if frozen:
                xs = jax.lax.stop_gradient(xs)
        return {f"c{i}": x for i, x in enumerate(xs, start=2)}

    def _stored(self, module: type[nn.Module], frozen: bool) -> type[nn.Module]:
        return nn.remat(module, static_argnums=(2,)) if self.remat and not frozen else module

    def frozen_pattern(self) -> str:
        """Regex (for `re.fullmatch`) of the '/'-joined paths of parameters that never change."""
        stages = [f"stage{i}" for i in range(1, self.frozen_stages + 1)]
        modules = ["stem", *stages, *(f"transition{i}" for i in range(1, self.frozen_stages))]
        return frozen_pattern(modules if self.frozen_stages else [], self.norm)
