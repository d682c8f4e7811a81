"""Feature pyramid network (Lin et al. 2017): one width and semantics for all strides."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.nn.layers.conv import Conv
from common.nn.layers.norm import Norm


def upsample_nearest(x: Float[Array, "B h w C"], height: int, width: int) -> Array:
    """Doubles both sides by repetition, cut to (height, width) when the finer level is odd."""
    batch, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, h, 2, w, 2, channels))
    return x.reshape(batch, 2 * h, 2 * w, channels)[:, :height, :width]


class FPN(nn.Module):
    """Levels P2..P5 from taps c2..c5 by top-down addition, and P6 = every second cell of P5.

    No activation, Xavier-uniform kernels. P6 serves the proposal network only.

    Attributes:
      channels: of every level.
      norm: after each convolution, a kind of `common.nn.layers.norm.Norm`, or "none".
      axis_name: device axis over which "sync" norm averages.
      dtype: of convolutions.
    """

    channels: int = 256
    norm: str = "none"
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, taps: Mapping[str, Float[Array, "B h w c"]], train: bool
    ) -> dict[str, Array]:
        """Maps {'c2': stride 4, ..., 'c5': stride 32} to {'p2': ..., 'p6': stride 64}."""
        names = sorted(taps, reverse=True)
        merged = {}
        above = None
        for name in names:
            level = name[1:]
            x = self._conv(taps[name], 1, f"lateral{level}", train)
            if above is not None:
                x = x + upsample_nearest(above, x.shape[1], x.shape[2])
            merged[level] = above = x
        pyramid = {
            f"p{level}": self._conv(x, 3, f"output{level}", train)
            for level, x in sorted(merged.items())
        }
        top = max(int(level) for level in merged)
        pyramid[f"p{top + 1}"] = pyramid[f"p{top}"][:, ::2, ::2]
        return pyramid

    def _conv(self, x: Float[Array, "B h w c"], side: int, name: str, train: bool) -> Array:
        """Made in the scope of `__call__`."""
        plain = self.norm == "none"
        x = Conv(
            self.channels,
            side,
            use_bias=plain,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name=name,
        )(x)
        if plain:
            return x
        norm = Norm(self.norm, axis_name=self.axis_name, dtype=self.dtype, name=f"{name}_norm")
        return norm(x, train)
