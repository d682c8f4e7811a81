"""Normalisation layers: one module, four kinds, one parameter tree.

Shapes: B images of this device, H W height and width, C channels.

Parameters `scale`, `bias` (C,) and running statistics `mean`, `var` (C,) have the same paths for
'frozen', 'batch' and 'sync', so that weights move freely between them; 'group' has no statistics.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.io.errors import UserError
from common.nn.parts import refuse_parts

NORM_KINDS = ("frozen", "batch", "sync", "group")


class Norm(nn.Module):
    """Normalises activations per channel; statistics and arithmetic are float32, output `dtype`.

    Attributes:
      kind: 'frozen' running statistics and constant scale and bias, never updated.
        'batch' statistics of each device's own images.
        'sync'  statistics of the images of all devices of `axis_name`.
        'group' statistics of each image over groups of channels (Wu & He 2018).
      axis_name: device axis of `jax.shard_map`; None where the layer sees the whole batch, which
        makes 'batch' and 'sync' the same. Running statistics average the devices.
      momentum: share of the old running statistics kept at each update.
      channel_groups: groups of 'group'; lowered to the largest divisor of C where C needs it.
      dtype: of the output.
    """

    kind: str = "sync"
    axis_name: str | None = None
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

        if self.kind == "sync":
            refuse_parts("norm 'sync'")
        x = x.astype(jnp.float32)
        part_mean, mean_square = x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))
        count = x.size // channels
        if self.axis_name is not None and self.kind == "sync":
            # Both moments in one all-reduce.
            part_mean, mean_square = jax.lax.pmean((part_mean, mean_square), self.axis_name)
            count *= jax.lax.axis_size(self.axis_name)
        part_var = jnp.maximum(mean_square - jnp.square(part_mean), 0.0)
        if not self.is_initializing():
            # The running variance is the unbiased estimate, as in torch and TensorFlow.
            seen = jax.lax.stop_gradient((part_mean, part_var * (count / max(count - 1, 1))))
            if self.axis_name is not None and self.kind == "batch":
                seen = jax.lax.pmean(seen, self.axis_name)
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * seen[0]
            var.value = keep * var.value + (1 - keep) * seen[1]
        multiplier = scale * jax.lax.rsqrt(part_var + self.epsilon)
        return (x * multiplier + (bias - part_mean * multiplier)).astype(self.dtype)

    def _group_norm(self, x, scale, bias):
        channels = x.shape[-1]
        groups = next(
            g for g in range(min(self.channel_groups, channels), 0, -1) if channels % g == 0
        )
        split = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
        axes = (*range(1, x.ndim - 1), x.ndim)
        mean, var = _moments(split, axes)
        y = ((split - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


def _moments(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance over `axes`, kept as size 1."""
    mean = jnp.mean(x, axes, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axes, keepdims=True)
    return mean, jnp.maximum(mean_square - jnp.square(mean), 0.0)


def frozen_pattern(modules: list[str], kind: str) -> str:
    """Regex (for `re.fullmatch`) of the parameters under `modules` and of all frozen norms."""
    parts = [f"(?:{'|'.join(modules)})/.*"] if modules else []
    if kind == "frozen":
        parts.append(r"(?:.*/)?[^/]*norm[^/]*/(?:scale|bias)")
    return "|".join(parts) or "(?!)"  # (?!) matches nothing
