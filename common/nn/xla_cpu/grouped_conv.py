"""Grouped convolution, computed on CPU with neighbouring groups merged to dense convolutions.

XLA:CPU runs a grouped convolution and the gradient of its kernel through generic loops. Here a few
groups at a time become one ungrouped convolution whose kernel is zero between different groups:
more arithmetic, but at the speed of a matmul, and a loop over these parts compiles as fast as one
of them. For the shapes of ResNeXt-101 ours takes 0.56 to 0.72 of the processor time forward (AMD
EPYC, jax 0.10.2; `python -m scripts.bench.bench_conv`, which shows the gradients too). TPU and GPU
have kernels of their own.

Shapes: B batch, H W input height and width, h w output height and width, C input channels,
D output channels, k kernel side, G groups, S parts of m merged groups each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from common.nn.xla_cpu.dense_conv import Pads, dense_conv, general_conv

# Input channels of a part: where fewer zeros and wider matmuls balance.
_PART_CHANNELS = 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def grouped_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C_per_group D"],
    strides: tuple[int, int],
    pads: Pads,
    groups: int,
) -> Float[Array, "B h w D"]:
    """Equals `lax.conv_general_dilated` with `feature_group_count=groups`; `pads` are explicit."""
    merged = _merged_groups(groups, kernel.shape[2])
    parts = _split(x, groups // merged), _block_diagonal(kernel, groups, merged)
    return _join(lax.map(lambda part: dense_conv(*part, strides, pads), parts))


def _merged_groups(groups: int, group_channels: int) -> int:
    """m: the largest divisor of `groups` that keeps a part within `_PART_CHANNELS`, at least 1."""
    limit = max(_PART_CHANNELS // group_channels, 1)
    return max(m for m in range(1, groups + 1) if groups % m == 0 and m <= limit)


def _split(x: Float[Array, "B H W C"], parts: int) -> Float[Array, "S B H W C/S"]:
    return jnp.moveaxis(x.reshape(*x.shape[:3], parts, -1), 3, 0)


def _join(x: Float[Array, "S B H W C/S"]) -> Float[Array, "B H W C"]:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1)


def _block_diagonal(kernel: Float[Array, "k k C_per_group D"], groups: int, merged: int) -> Array:
    """(S, k, k, m C / G, m D / G): kernels of the parts, zero between different groups."""
    rows, columns, c, d = kernel.shape
    d //= groups
    blocks = kernel.reshape(rows, columns, c, groups // merged, merged, d)
    # (S, k, k, m, C / G, m, D / G): a block for each pair of groups
    spread = jnp.einsum("ijcsmd,nm->sijncmd", blocks, jnp.eye(merged, dtype=kernel.dtype))
    return spread.reshape(groups // merged, rows, columns, merged * c, merged * d)


def _diagonal_blocks(parts: Array, kernel_shape: tuple[int, ...], groups: int) -> Array:
    """Transpose of `_block_diagonal`: (k, k, C / G, D)."""
    rows, columns, c, d = kernel_shape
    merged = groups // parts.shape[0]
    blocks = parts.reshape(-1, rows, columns, merged, c, merged, d // groups)
    blocks = jnp.einsum("sijmcmd->ijcsmd", blocks)
    return blocks.reshape(kernel_shape)


def _forward(x, kernel, strides, pads, groups):
    return grouped_conv(x, kernel, strides, pads, groups), (x, kernel)


def _backward(strides, pads, groups, saved, grad):
    x, kernel = saved
    merged = _merged_groups(groups, kernel.shape[2])
    num_parts = groups // merged

    def kernel_gradient(part):
        x, kernel, grad = part
        return jax.vjp(lambda kernel: dense_conv(x, kernel, strides, pads), kernel)[1](grad)[0]

    parts = (_split(x, num_parts), _block_diagonal(kernel, groups, merged), _split(grad, num_parts))
    kernel_grad = lax.map(kernel_gradient, parts)
    # XLA's own input gradient is the fast one: 4 to 7 times as fast as one of parts in the loop.
    (x_grad,) = jax.vjp(lambda x: general_conv(x, kernel, strides, pads, groups), x)[1](grad)
    return x_grad, _diagonal_blocks(kernel_grad, kernel.shape, groups)


grouped_conv.defvjp(_forward, _backward)
