"""Ungrouped convolution, computed by matmuls where XLA:CPU is slower than they are.

Two parts are computed differently on CPU: a convolution with a 1x1 kernel is the matmul over
channels that it is, and the kernel's gradient is a sum of matmuls over positions, one for each
element of the kernel. XLA:CPU computes that gradient as a convolution whose window is the whole
image. TPU and GPU convolve and differentiate as usual, since their compilers choose such forms.

For ResNet-50's 1x1 kernels ours takes 0.83 to 0.87 of the processor time forward and 0.33 to 0.44
for the kernel's gradient (AMD EPYC, jax 0.10.2; `python -m scripts.bench.bench_conv`).

Shapes: B batch, H W input height and width, h w output height and width, C input channels,
D output channels, k kernel side, N = B * h * w output positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]
# Below this many input channels the kernel's elements share one matmul: one each would be too thin.
_THIN = 16


def general_conv(x, kernel, strides, pads, groups=1):
    """The convolution as XLA computes it by itself."""
    return lax.conv_general_dilated(
        *(x, kernel, strides, pads),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(x, kernel, strides, pads):
    """`general_conv` of a 1x1 kernel without padding."""
    del pads
    x = x[:, :: strides[0], :: strides[1]]
    product = _dot(x.reshape(-1, x.shape[-1]), kernel[0, 0])
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _convolve(x, kernel, strides, pads):
    if kernel.shape[:2] != (1, 1) or any(low or high for low, high in pads):
        return general_conv(x, kernel, strides, pads)
    matmul, general = (
        functools.partial(form, strides=strides, pads=pads) for form in (_pointwise, general_conv)
    )
    return lax.platform_dependent(x, kernel, cpu=matmul, default=general)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C D"],
    strides: tuple[int, int],
    pads: Pads,
) -> Float[Array, "B h w D"]:
    """Equals `lax.conv_general_dilated`; `pads` are explicit. Reverse mode only."""
    return _convolve(x, kernel, strides, pads)


def _forward(x, kernel, strides, pads):
    return _convolve(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, saved, grad):
    x, kernel = saved
    (x_grad,) = jax.vjp(lambda x: _convolve(x, kernel, strides, pads), x)[1](grad)
    kernel_grad = lax.platform_dependent(
        x,
        kernel,
        grad,
        cpu=lambda x, kernel, grad: _kernel_grad(x, kernel.shape, grad, strides, pads),
        default=lambda x, kernel, grad: jax.vjp(
            lambda kernel: general_conv(x, kernel, strides, pads), kernel
        )[1](grad)[0],
    )
    return x_grad, kernel_grad.astype(kernel.dtype)


def _kernel_grad(x, kernel_shape, grad, strides, pads):
    """(k, k, C, D) as matmuls over positions."""
    if strides == (1, 1) and kernel_shape[:2] != (1, 1):
        return _kernel_grad_at_once(x, kernel_shape, grad, pads)
    rows, columns, c, d = kernel_shape
    h, w = grad.shape[1:3]
    if any(low or high for low, high in pads):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    taps = []
    for i in range(rows):
        for j in range(columns):
            stop = (i + (h - 1) * strides[0] + 1, j + (w - 1) * strides[1] + 1)
            view = x[:, i : stop[0] : strides[0], j : stop[1] : strides[1]]
            taps.append(view.reshape(-1, c))
    if c < _THIN:
        taps = [jnp.concatenate(taps, axis=1)]
    grad = grad.reshape(-1, d)
    if len(taps) == 1 and taps[0].shape[1] < d:
        product = _dot(_transposed(taps[0]), grad)
    else:
        grad = _transposed(grad)
        # The barriers keep XLA from folding transposes into the matmuls, forms it has no fast
        # kernel for.
        products = [_dot(grad, lax.optimization_barrier(tap)) for tap in taps]
        product = jnp.concatenate([lax.optimization_barrier(p).T for p in products])
    return product.reshape(kernel_shape).astype(x.dtype)


def _kernel_grad_at_once(x, kernel_shape, grad, pads):
    """Stride 1: all kernel elements as one matmul.

    Element (i, j) is the sum over positions of x shifted by j columns times grad shifted back by i
    rows, so k shifted copies of each operand side by side meet in all k * k pairs.
    """
    rows, columns, c, d = kernel_shape
    (top, bottom), pad_columns = pads
    x = jnp.pad(x, ((0, 0), (0, 0), pad_columns, (0, 0)))
    nothing = (0, 0, 0)
    around = (nothing, (rows - 1 - top, rows - 1 - bottom, 0), nothing, nothing)
    h, w = x.shape[1], grad.shape[2]
    grad = lax.pad(grad, jnp.zeros((), grad.dtype), around)
    x = jnp.concatenate([x[:, :, j : j + w] for j in range(columns)], -1)
    grad = jnp.concatenate([grad[:, rows - 1 - i :][:, :h] for i in range(rows)], -1)
    x, grad = x.reshape(-1, columns * c), grad.reshape(-1, rows * d)
    if len(x) < columns * c:  # few positions: the matmul from which no transpose is left to fold
        product = _dot(_transposed(grad), lax.optimization_barrier(x))
        product = product.reshape(rows, d, columns, c).transpose(0, 2, 3, 1)
    else:
        over_positions = (((0,), (0,)), ((), ()))
        product = lax.dot_general(x, grad, over_positions, preferred_element_type=jnp.float32)
        product = product.reshape(columns, c, rows, d).transpose(2, 0, 1, 3)
    return product.astype(x.dtype)


def _transposed(x):
    return lax.optimization_barrier(x.T)


def _dot(a, b):
    return lax.dot(a, b, preferred_element_type=jnp.float32)


dense_conv.defvjp(_forward, _backward)
