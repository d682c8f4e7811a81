"""NAS-FPN: a searched pyramid of merging cells (Ghiasi et al. 2019, figure 6, "7@384").

A cell takes five levels and returns five. It is a list of merges of two earlier nodes, resampled to
the level of the new one; the cell is repeated with weights of its own.

Shape legend: B images, H W cells of a level, C channels.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.nn.layers.conv import Conv
from common.nn.layers.norm import Norm

NUM_LEVELS = 5


class Merge(NamedTuple):
    """One node of a cell. Nodes 0 to 4 are the inputs, finest first; merges follow.

    Attributes:
      level: of the node, counted from the finest.
      first, second: nodes that are merged. In an attention merge `second` is the gate.
      attention: gated sum (`attend`) instead of a plain one.
      beside: further nodes of the same level that are added: outputs take up every node of their
        level that nothing else has used.
      is_output: whether the node is the cell's output of its level.
    """

    level: int
    first: int
    second: int
    attention: bool
    beside: tuple[int, ...] = ()
    is_output: bool = False


# The published cell.
CELL = (
    Merge(1, 1, 3, True),
    Merge(1, 1, 5, False),
    Merge(0, 0, 6, False, is_output=True),
    Merge(1, 6, 7, False, is_output=True),
    Merge(2, 7, 8, True, beside=(2,), is_output=True),
    Merge(4, 6, 9, True, beside=(4,), is_output=True),
    Merge(3, 9, 10, True, is_output=True),
)


def attend(x: Float[Array, "B H W C"], gate: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """gate + x * sigmoid(maximum of the gate over the image), per channel."""
    return gate + x * jax.nn.sigmoid(gate.max(axis=(1, 2), keepdims=True))


def resample(
    x: Float[Array, "B _H _W C"], steps: int, size: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """Moves a map by `steps` levels: up by max-pooling (steps > 0), down by repetition (< 0).

    `size` is that of the target level; repeated cells beyond it are cut off.
    """
    if steps > 0:
        factor = 2**steps
        return nn.max_pool(x, (factor, factor), (factor, factor), padding="SAME")
    if steps < 0:
        batch, height, width, channels = x.shape
        factor = 2**-steps
        shape = (batch, height, factor, width, factor, channels)
        x = jnp.broadcast_to(x[:, :, None, :, None], shape)
        x = x.reshape(batch, height * factor, width * factor, channels)
        return x[:, : size[0], : size[1]]
    return x


class NASFPN(nn.Module):
    """Five pyramid levels from backbone taps.

    Attributes:
      channels: C of all levels.
      repeats: how often the cell is applied.
      min_level: level of the finest output: 3 (published) or 2.
      norm: kind of normalisation, see `common.nn.layers.norm.Norm`.
      axis_name: device axis over which "sync" norm averages.
      dtype: of activations.
    """

    channels: int = 256
    repeats: int = 7
    min_level: int = 3
    norm: str = "sync"
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, taps: Mapping[str, Float[Array, "B H W c"]], train: bool
    ) -> dict[str, Float[Array, "B H W C"]]:
        """Maps {'c2': stride 4, ..., 'c5': stride 32} to five levels from p`min_level`."""
        levels = []
        for number in range(self.min_level, self.min_level + NUM_LEVELS):
            if number <= 5:
                x = self._conv(1, f"lateral{number}")(taps[f"c{number}"])
                levels.append(self._norm(f"lateral{number}_norm")(x, train))
            else:
                levels.append(nn.max_pool(levels[-1], (2, 2), (2, 2), padding="SAME"))
        for repeat in range(self.repeats):
            levels = self._cell(levels, f"cell{repeat}", train)
        return {f"p{self.min_level + i}": level for i, level in enumerate(levels)}

    def _cell(self, levels: list[Array], name: str, train: bool) -> list[Array]:
        nodes = list(levels)
        at = list(range(NUM_LEVELS))
        outputs = {}
        for number, merge in enumerate(CELL):
            height, width = levels[merge.level].shape[1:3]
            first, second = (
                resample(nodes[i], merge.level - at[i], (height, width))
                for i in (merge.first, merge.second)
            )
            x = attend(first, second) if merge.attention else first + second
            for i in merge.beside:
                x = x + nodes[i]
            x = self._conv(3, f"{name}_conv{number}")(nn.relu(x))
            x = self._norm(f"{name}_norm{number}")(x, train)
            nodes.append(x)
            at.append(merge.level)
            if merge.is_output:
                outputs[merge.level] = x
        return [outputs[level] for level in range(NUM_LEVELS)]

    def _conv(self, size: int, name: str) -> nn.Module:
        return Conv(
            self.channels,
            (size, size),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name=name,
        )

    def _norm(self, name: str) -> nn.Module:
        return Norm(self.norm, axis_name=self.axis_name, dtype=self.dtype, name=name)
