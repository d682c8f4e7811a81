"""Normalisation layers: one module, four kinds, one parameter tree.

Shapes: B batch, H W height and width, C channels, N = `norm_groups` (one group = the images of one
device), G = channel groups of group norm.

Parameters `scale`, `bias` (C,) and running statistics `mean`, `var` (C,) have the same paths for
'frozen', 'batch' and 'sync', so that weights move freely between them; 'group' has no statistics.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.errors import UserError

NORM_KINDS = ("frozen", "batch", "sync", "group")


class Norm(nn.Module):
    """Normalises activations per channel; statistics and arithmetic are float32, output `dtype`.

    Attributes:
      kind: 'frozen' running statistics and constant scale and bias, never updated.
        'batch' statistics of each device's own images (set `norm_groups` to the device count).
        'sync'  statistics of the global batch (under `jit` over a global batch, XLA reduces
                across devices).
        'group' statistics of each image over groups of channels (Wu & He 2018).
      norm_groups: number of equal, contiguous parts of the batch with their own statistics
        ('batch' only). Running statistics average the parts.
      momentum: share of the old running statistics kept at each update.
      channel_groups: groups of 'group'; lowered to the largest divisor of C where C needs it.
      dtype: of the output.
    """

    kind: str = "sync"
    norm_groups: int = 1
    epsilon: float = 1e-5
    momentum: float = 0.9
    channel_groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        """`train=False` uses the running statistics whatever the kind (group norm has none)."""
        if self.kind not in NORM_KINDS:
            raise UserError(f"norm: found {self.kind!r}, expected one of {', '.join(NORM_KINDS)}")
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        if self.kind == "group":
            return self._group_norm(x, scale, bias)

        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if self.kind == "frozen":
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if self.kind == "frozen" or not train:
            multiplier = scale * jax.lax.rsqrt(var.value + self.epsilon)
            offset = bias - mean.value * multiplier
            return (x.astype(jnp.float32) * multiplier + offset).astype(self.dtype)

        parts = self.norm_groups if self.kind == "batch" else 1
        batch = x.shape[0]
        if batch % parts:
            raise UserError(
                f"norm_groups: found {parts}, expected a divisor of the batch size {batch}"
            )
        x = x.astype(jnp.float32).reshape(parts, batch // parts, *x.shape[1:])
        axes = tuple(range(1, x.ndim - 1))
        part_mean, part_var = _moments(x, axes)  # (N, 1, .., C)
        if not self.is_initializing():
            count = x.size // (parts * channels)
            keep = self.momentum
            # The running variance is the unbiased estimate, as in torch and TensorFlow.
            unbiased = part_var.mean(0).reshape(channels) * (count / max(count - 1, 1))
            mean.value = keep * mean.value + (1 - keep) * part_mean.mean(0).reshape(channels)
            var.value = keep * var.value + (1 - keep) * unbiased
        multiplier = scale * jax.lax.rsqrt(part_var + self.epsilon)
        y = x * multiplier + (bias - part_mean * multiplier)
        return y.reshape(batch, *y.shape[2:]).astype(self.dtype)

    def _group_norm(self, x, scale, bias):
        channels = x.shape[-1]
        groups = next(g for g in range(min(self.channel_groups, channels), 0, -1)
                      if channels % g == 0)
        split = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
        axes = (*range(1, x.ndim - 1), x.ndim)
        mean, var = _moments(split, axes)
        y = ((split - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


def _moments(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance over `axes`, kept as size 1; one pass, hence one all-reduce."""
    mean = jnp.mean(x, axes, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axes, keepdims=True)
    return mean, jnp.maximum(mean_square - jnp.square(mean), 0.0)


def frozen_pattern(modules: list[str], kind: str) -> str:
    """Regex (for `re.fullmatch`) of the parameters under `modules` and of all frozen norms."""
    parts = [f"(?:{'|'.join(modules)})/.*"] if modules else []
    if kind == "frozen":
        parts.append(r"(?:.*/)?[^/]*norm[^/]*/(?:scale|bias)")
    return "|".join(parts) or "(?!)"  # (?!) matches nothing
