"""Convolutions of 3x3 on CPU by Winograd's minimal filtering, F(2x2, 3x3) (Lavin and Gray 2016).

Four outputs, two by two, are made of a window of 4x4 inputs by 16 multiplications instead of 36:
both window and kernel are transformed, multiplied element by element (over channels: 16 matmuls),
and transformed back. The gradients are the same chain backwards, with as few multiplications.

It pays where channels are many and maps small, as in a mask head (`python -m
scripts.bench.bench_conv --kinds=winograd`).

Shapes: B batch, H W height and width, even; C input channels, D output channels; n = H / 2,
m = W / 2 windows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from common.nn.xla_cpu.dense_conv import dense_conv

_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def small_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]
) -> Float[Array, "B H W D"]:
    """3x3, stride 1, one cell of zeros around: by Winograd on CPU, as usual elsewhere.

    Maps of odd sides, and types in which the transformed windows would be rounded, are convolved as
    usual on CPU too.
    """
    usual = functools.partial(dense_conv, strides=(1, 1), pads=((1, 1), (1, 1)))
    if x.dtype != jnp.float32 or x.shape[1] % 2 or x.shape[2] % 2:
        return usual(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=winograd_conv, default=usual)


@jax.custom_vjp
def winograd_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]
) -> Float[Array, "B H W D"]:
    """Stride 1, one cell of zeros around. Differentiable once, in reverse mode.

    Equals the convolution up to rounding, of a few 1e-6 of the largest value in float32.
    """
    pairs = zip(_windows(x), _transformed(kernel), strict=True)
    products = [[window @ u for window, u in zip(*row, strict=True)] for row in pairs]
    # Fused into the sums that follow, a matmul would be computed element by element.
    return _merge(lax.optimization_barrier(products), x.shape[1:3])


def _windows(x: Float[Array, "B H W C"]) -> list[list[Float[Array, "Bnm C"]]]:
    """The 4x4 elements of the transformed windows, B^T d B."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def split(x, axis):
        length = x.shape[axis]
        d = [lax.slice_in_dim(x, i, length - 3 + i, 2, axis) for i in range(4)]
        return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]

    rows = [split(row, 2) for row in split(padded, 1)]
    return [[lax.optimization_barrier(e.reshape(-1, e.shape[-1])) for e in row] for row in rows]


def _transformed(kernel: Float[Array, "3 3 C D"]) -> Float[Array, "4 4 C D"]:
    """G g G^T."""
    g = jnp.array(_TRANSFORM, kernel.dtype)
    return jnp.einsum("ai,ijcd,bj->abcd", g, kernel, g, precision=lax.Precision.HIGHEST)


def _merge(products: list[list[Float[Array, "Bnm D"]]], size) -> Float[Array, "B H W D"]:
    """A^T m A, and the outputs of all windows in their places."""
    height, width = size

    def join(m):
        return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

    columns = list(zip(*(join(row) for row in products), strict=True))  # 2 x 4
    shape = (-1, height // 2, width // 2, products[0][0].shape[-1])
    halves = [[part.reshape(shape) for part in join(column)] for column in columns]  # column, row
    rows = [jnp.stack([halves[0][i], halves[1][i]], 3) for i in range(2)]
    return jnp.stack(rows, 2).reshape(-1, height, width, shape[-1])


def _forward(x, kernel):
    return winograd_conv(x, kernel), (x, kernel)


def _backward(saved, grad):
    x, kernel = saved
    size, channels = x.shape[1:3], grad.shape[-1]
    example = [[jnp.zeros((grad.size // channels // 4, channels), grad.dtype)] * 4] * 4
    (products,) = jax.linear_transpose(lambda m: _merge(m, size), example)(grad)
    products = lax.optimization_barrier(products)
    windows, transpose_windows = jax.vjp(_windows, x)
    u, transpose_kernel = jax.vjp(_transformed, kernel)
    window_grads = [
        [lax.optimization_barrier(products[i][j] @ u[i, j].T) for j in range(4)] for i in range(4)
    ]
    kernel_grads = [
        [lax.optimization_barrier(windows[i][j].T @ products[i][j]) for j in range(4)]
        for i in range(4)
    ]
    kernel_grad = jnp.stack([jnp.stack(row) for row in kernel_grads])
    return transpose_windows(window_grads)[0], transpose_kernel(kernel_grad)[0]


winograd_conv.defvjp(_forward, _backward)
