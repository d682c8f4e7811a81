"""NASNet-A (Zoph et al. 2018): cells that combine the two feature maps before them.

Shapes: B batch, H W input height and width, h w those of a cell, C channels in, F those of each
operation of the cell (`features`). NHWC.

Every operation starts with ReLU, so the feature maps between cells are before it; the taps are
after it. Parameter paths read `stem/conv/kernel`, `stem_cell0/squeeze_conv/kernel`,
`cell3/combine0_left/depthwise1_conv/kernel`, `cell6/factor_norm/scale`, `reduction0/...`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.backbones.efficientnet import DropPath
from common.nn.layers.conv import Conv
from common.nn.layers.norm import Norm, frozen_pattern


@dataclasses.dataclass(frozen=True)
class Layout:
    """What tells the networks apart.

    Attributes:
      filters: F of the cells of stride 8; 24 F channels leave the last cell (large: "6 @ 4032").
      num_cells: normal cells at each of the strides 8, 16, 32.
      stem_features: channels of the first convolution.
      skip_reduction: the cell after a reduction combines it with the cell output that came before
        the reduction's own input, instead of with that input.
    """

    filters: int
    num_cells: int
    stem_features: int
    skip_reduction: bool


NASNETS = {
    "nasnet_mobile": Layout(44, 4, 32, False),  # 4 @ 1056
    "nasnet_large": Layout(168, 6, 96, True),  # 6 @ 4032
    "nasnet_reduced": Layout(80, 6, 96, True),  # 6 @ 1920, a smaller "depth multiplier"
}


class Separable(nn.Module):
    """Twice ReLU, depthwise and 1x1 convolution, norm; the first depthwise one strides."""

    features: int
    kernel_size: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool) -> Float[Array, "B _h _w F"]:
        for i, stride in enumerate((self.stride, 1), start=1):
            x = nn.relu(x)
            x = self.conv(
                x.shape[-1], self.kernel_size, stride, groups=x.shape[-1], name=f"depthwise{i}_conv"
            )(x)
            x = self.conv(self.features, 1, name=f"pointwise{i}_conv")(x)
            x = self.norm(name=f"norm{i}")(x, train)
        return x


class Cell(nn.Module):
    """What normal and reduction cells share: inputs of `features` channels, and operations.

    Attributes:
      features: F.
      factorise: whether the previous feature map has twice the resolution of the cell's input.
      drop_path: makes the stochastic depth of an operation.
    """

    features: int
    factorise: bool
    conv: Callable
    norm: Callable
    drop_path: Callable
    average_counts_padding: bool

    def squeezed(self, x, train, name="squeeze"):
        """ReLU, 1x1 convolution, norm."""
        x = self.conv(self.features, 1, name=f"{name}_conv")(nn.relu(x))
        return self.norm(name=f"{name}_norm")(x, train)

    def adapted(self, previous, train):
        """The previous feature map at this cell's resolution and width."""
        if not self.factorise:
            return self.squeezed(previous, train, "squeeze_previous")
        # Two 1x1 convolutions, on even and on odd rows and columns.
        x = nn.relu(previous)
        odd = jnp.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        halves = [
            self.conv(self.features // 2, 1, name=f"factor{i}_conv")(part[:, ::2, ::2])
            for i, part in enumerate((x, odd), start=1)
        ]
        return self.norm(name="factor_norm")(jnp.concatenate(halves, -1), train)

    def separable(self, name, x, kernel_size, stride, train):
        module = Separable(
            self.features, kernel_size, stride, self.conv, self.norm, name=f"combine{name}"
        )
        return self.drop_path()(module(x, train), train)

    def average(self, x, stride, train):
        count_padding = self.average_counts_padding and stride == 2
        y = nn.avg_pool(x, (3, 3), (stride, stride), "SAME", count_include_pad=count_padding)
        return self.drop_path()(y.astype(x.dtype), train)

    def maximum(self, x, train):
        return self.drop_path()(nn.max_pool(x, (3, 3), (2, 2), "SAME"), train)


class NormalCell(Cell):
    """Keeps the resolution of `x`; 6 F channels."""

    @nn.compact
    def __call__(self, x: Array, previous: Array, train: bool) -> Float[Array, "B h w 6*F"]:
        h = self.squeezed(x, train)
        p = self.adapted(previous, train)
        sums = [
            self.separable("0_left", h, 5, 1, train) + self.separable("0_right", p, 3, 1, train),
            self.separable("1_left", p, 5, 1, train) + self.separable("1_right", p, 3, 1, train),
            self.average(h, 1, train) + p,
            self.average(p, 1, train) + self.average(p, 1, train),
            self.separable("4_left", h, 3, 1, train) + h,
        ]
        return jnp.concatenate([p, *sums], -1)


class ReductionCell(Cell):
    """Halves the resolution of `x`; 4 F channels. The first one of the stem has no `previous`."""

    @nn.compact
    def __call__(
        self, x: Array, previous: Array | None, train: bool
    ) -> Float[Array, "B _h _w 4*F"]:
        h = self.squeezed(x, train)
        p = x if previous is None else self.adapted(previous, train)
        sum0 = self.separable("0_left", h, 5, 2, train) + self.separable("0_right", p, 7, 2, train)
        sum1 = self.maximum(h, train) + self.separable("1_right", p, 7, 2, train)
        sum2 = self.average(h, 2, train) + self.separable("2_right", p, 5, 2, train)
        sum3 = self.average(sum0, 1, train) + sum1
        sum4 = self.separable("4_left", sum0, 3, 1, train) + self.maximum(h, train)
        return jnp.concatenate([sum1, sum2, sum3, sum4], -1)


class Stem(nn.Module):
    """3x3 convolution of stride 2 without padding, and norm."""

    features: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w C"]:
        x = self.conv(self.features, 3, 2, padding="VALID", name="conv")(x)
        return self.norm(name="norm")(x, train)


class NASNet(nn.Module):
    """Trunk without the classifier: taps c2..c5 of F, 6 F, 12 F, 24 F channels, strides 4..32.

    Attributes:
      layout: of the network.
      norm: kind of normalisation, see `common.nn.layers.norm.Norm`.
      axis_name: device axis over which 'sync' norm averages, see `Norm`.
      frozen_stages: 0 trains everything, n >= 1 freezes what leads to the taps c2..c(n+1).
      remat: recompute each trained cell in the backward pass instead of storing activations.
      drop_path_rate: probability of dropping an operation of the last cell; grows linearly with
        the cells (needs the rng stream 'dropout' in training unless 0).
      average_counts_padding: average pools of stride 2 count cells of the padding, as timm's
        network does; TensorFlow's original does not.
      dtype: of activations; parameters are float32.
    """

    layout: Layout
    norm: str = "frozen"
    axis_name: str | None = None
    frozen_stages: int = 0
    remat: bool = False
    drop_path_rate: float = 0.0
    average_counts_padding: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> dict[str, Array]:
        """`images` normalised (see `common.nn.backbones.preprocessing`)."""
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            Norm, self.norm, axis_name=self.axis_name, epsilon=1e-3, dtype=self.dtype
        )
        layout, stages = self.layout, self._stages()
        stem_train = train and self.frozen_stages < 1
        x = Stem(layout.stem_features, conv, norm, name="stem")(
            images.astype(self.dtype), stem_train
        )
        previous, made, taps = None, 0, {}
        total = sum(map(len, stages))
        halves = ("stem_cell1", *(names[1] for names in stages[1:]))
        for i, names in enumerate(stages, start=1):
            frozen = i <= self.frozen_stages
            features = layout.filters * 2 ** (i - 2) if i > 1 else layout.filters // 4
            for name in names:
                made += 1
                reduces = name.startswith(("stem_cell", "reduction"))
                cell_class: type[nn.Module] = ReductionCell if reduces else NormalCell
                if self.remat and not frozen:
                    cell_class = nn.remat(cell_class, static_argnums=(3,))
                cell = cell_class(
                    layout.filters // 2 if name == "stem_cell1" else features,
                    name in halves,
                    conv,
                    norm,
                    functools.partial(DropPath, self.drop_path_rate * made / total, self.axis_name),
                    self.average_counts_padding,
                    name=name,
                )
                output = cell(x, previous, train and not frozen)
                if not (name.startswith("reduction") and layout.skip_reduction):
                    previous = x
                x = output
            if frozen:
                x, previous = jax.lax.stop_gradient((x, previous))
            taps[f"c{i + 1}"] = nn.relu(x)
        return taps

    def _stages(self) -> list[list[str]]:
        """Cells that lead from each tap to the next."""
        n = self.layout.num_cells
        cells = [[f"cell{i}" for i in range(n * s, n * (s + 1))] for s in range(3)]
        return [
            ["stem_cell0"],
            ["stem_cell1", *cells[0]],
            ["reduction0", *cells[1]],
            ["reduction1", *cells[2]],
        ]

    def frozen_pattern(self) -> str:
        """Regex (for `re.fullmatch`) of the '/'-joined paths of parameters that never change."""
        stages = self._stages()[: self.frozen_stages]
        modules = ["stem", *(name for names in stages for name in names)]
        return frozen_pattern(modules if self.frozen_stages else [], self.norm)
