"""Deformable convolution (Dai et al. 2017) and its modulated form (Zhu et al. 2019, "v2").

Each kernel element samples the input at a point of its own, which the layer predicts. All samples
of one kernel element make a map to which that element is applied as a 1x1 convolution; the sum over
the elements is the output. Only the maps of one element exist at a time, and backward samples anew
(it has to read the cells in any case, for the gradient of the offsets).

Shapes: B batch, H W input height and width, h w output height and width, C input channels,
D output channels, k kernel side, T = k * k kernel elements ("taps") row by row, N = h * w.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from common import bilinear
from common.nn.conv import Conv, Padding, conv2d, he_normal_fan_out

_BORDER = "zero"
_LANES = 128


def deform_conv2d(
    x: Float[Array, "B H W C"],
    offsets: Float[Array, "B h w two_T"],
    kernel: Float[Array, "k k C_per_group D"],
    *,
    mask: Float[Array, "B h w T"] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    method: str | None = None,
) -> Float[Array, "B h w D"]:
    """Convolution whose taps are moved by `offsets`; cells outside the map are zero.

    Differentiable once, in reverse mode, with respect to all arrays. Without offsets and mask it
    is an ordinary convolution.

    Args:
      x: input; the result has its type, sums over taps are float32.
      offsets: cells; channel 2 t moves tap t down, channel 2 t + 1 to the right.
      kernel: as of an ordinary convolution.
      mask: factors of the samples (v2); None: 1.
      stride: of the output.
      padding: as of `conv2d`.
      dilation: distance of neighbouring taps.
      groups: of channels; all move alike.
      method: one of `bilinear.METHODS`; None takes what suits the platform that the program is
        compiled for.

    Raises:
      ValueError: unknown method, or offsets or mask of another shape than the output's.
    """
    bilinear.check_method(method)
    sides, strides, dilations = kernel.shape[:2], _pair(stride), _pair(dilation)
    reach = [(side - 1) * step + 1 for side, step in zip(sides, dilations, strict=True)]
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    elif isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    size = tuple(
        (x.shape[axis + 1] + sum(padding[axis]) - reach[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    taps = sides[0] * sides[1]
    for name, array, channels in (("offsets", offsets, 2 * taps), ("mask", mask, taps)):
        if array is not None and array.shape != (x.shape[0], *size, channels):
            expected = (x.shape[0], *size, channels)
            raise ValueError(f"{name} of shape {array.shape}, expected {expected}")

    # Positions as the last axis: TPU pads that one to 128.
    offsets = offsets.astype(jnp.float32).reshape(x.shape[0], -1, taps, 2)
    y, x_points = jnp.moveaxis(offsets, (3, 2), (0, 1))
    rows, columns = (
        jnp.arange(size[axis])[:, None] * strides[axis] - padding[axis][0]
        + jnp.arange(sides[axis]) * dilations[axis]
        for axis in (0, 1)
    )
    shape = (*size, *sides)
    rows = jnp.broadcast_to(rows[:, None, :, None], shape).reshape(-1, taps).T
    columns = jnp.broadcast_to(columns[None, :, None, :], shape).reshape(-1, taps).T
    y, x_points = y + rows[:, None], x_points + columns[:, None]
    if mask is not None:
        mask = jnp.moveaxis(mask.astype(jnp.float32).reshape(x.shape[0], -1, taps), 2, 0)
    kernel = kernel.reshape(taps, *kernel.shape[2:])
    return _deform_conv(method, size, groups, x, y, x_points, mask, kernel)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _deform_conv(method, size, groups, x, y, x_points, mask, kernel):
    """`y`, `x_points` and `mask` (T, B, N); `kernel` (T, C / groups, D); `size` (h, w)."""

    def forward(method, x, *taps):
        table = bilinear.make_table(method, [x])

        def add_tap(total, tap):
            y, x_points, mask, kernel = tap
            place = bilinear.locate(method, _BORDER, (x.shape[1:3],), None, y, x_points)
            weights = _masked(place.weights, mask)
            samples = bilinear.interpolate(weights, bilinear.read(table, place.rows))
            return total + _product(method, size, groups, samples.astype(x.dtype), kernel), None

        total = jnp.zeros((*y.shape[1:], kernel.shape[-1]), jnp.float32)
        total, _ = lax.scan(add_tap, total, taps, unroll=bilinear.unrolled(method))
        return total.astype(x.dtype).reshape(x.shape[0], *size, -1)

    return bilinear.by_platform(method, forward, x, y, x_points, mask, kernel)


def _masked(weights, mask):
    return weights if mask is None else tuple(weight * mask for weight in weights)


def _product(method, size, groups, samples, kernel):
    """(B, N, D): samples (B, N, C) times the kernel (C / groups, D) of a tap."""
    if method == "corners":
        samples = samples.reshape(samples.shape[0], *size, -1)
        product = conv2d(samples, kernel[None, None], padding=0, groups=groups)
        return product.reshape(product.shape[0], -1, product.shape[-1])
    # TPU's matrix unit takes _LANES channels: neighbouring groups that share it cost nothing, while
    # a batch of narrow products would be padded to that width one by one.
    group_channels = kernel.shape[0]
    merged = max(
        m for m in range(1, groups + 1)
        if groups % m == 0 and m * group_channels <= max(_LANES, group_channels)
    )
    blocks = kernel.reshape(group_channels, groups // merged, merged, -1)
    blocks = jnp.einsum("cpmd,nm->pncmd", blocks, jnp.eye(merged, dtype=kernel.dtype))
    blocks = blocks.reshape(groups // merged, merged * group_channels, -1)
    parts = jnp.split(samples, len(blocks), axis=-1)
    return jnp.concatenate([p @ b for p, b in zip(parts, blocks, strict=True)], axis=-1)


def _deform_conv_forward(method, size, groups, *arrays):
    return _deform_conv(method, size, groups, *arrays), arrays


def _deform_conv_backward(method, size, groups, saved, grad):
    def backward(method, grad, x, *taps):
        table = bilinear.make_table(method, [x])
        grad = grad.reshape(x.shape[0], -1, grad.shape[-1])

        def add_tap(total, tap):
            y, x_points, mask, kernel = tap
            place = bilinear.locate(method, _BORDER, (x.shape[1:3],), None, y, x_points)
            weights = _masked(place.weights, mask)
            cells = bilinear.read(table, place.rows)
            samples = bilinear.interpolate(weights, cells).astype(x.dtype)
            product = functools.partial(_product, method, size, groups)
            samples_grad, kernel_grad = jax.vjp(product, samples, kernel)[1](grad)
            samples_grad = samples_grad.astype(jnp.float32)
            total = bilinear.add(total, place.rows, weights, samples_grad)
            slopes = bilinear.contract(cells, samples_grad)
            mask_grad = None if mask is None else bilinear.dot(place.weights, slopes)
            slopes = _masked(slopes, mask)
            y_grad = bilinear.dot(place.y_slopes, slopes)
            x_grad = bilinear.dot(place.x_slopes, slopes)
            return total, (y_grad, x_grad, mask_grad, kernel_grad)

        total = jnp.zeros(table.shape, jnp.float32)
        total, grads = lax.scan(add_tap, total, taps, unroll=bilinear.unrolled(method))
        (x_grad,) = bilinear.fold_table(method, (x.shape[1:3],), total)
        return x_grad.astype(x.dtype), *grads

    return bilinear.by_platform(method, backward, grad, *saved)


_deform_conv.defvjp(_deform_conv_forward, _deform_conv_backward)


class DeformConv(nn.Module):
    """Takes the place of `Conv`: same parameter `kernel`, and a convolution `offset` beside it.

    The offsets start at zero, as an ordinary convolution; in version 2 the factors of the samples
    start at sigmoid(0) = 0.5, which halves the output (Zhu et al. 2019, section 3.2).

    Attributes:
      version: 1 offsets, 2 offsets and a factor for each sample.
      others: as of `Conv`.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    groups: int = 1
    version: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable | None = None
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if self.version not in (1, 2):
            raise ValueError(f"deformable convolution version {self.version}, expected 1 or 2")
        size = _pair(self.kernel_size)
        taps = size[0] * size[1]
        shape = (*size, inputs.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init or he_normal_fan_out(self.groups), shape)
        branch = Conv(
            (self.version + 1) * taps, size, self.strides, self.padding, use_bias=True,
            dtype=self.dtype, kernel_init=nn.initializers.zeros_init(), name="offset",
        )(inputs)
        mask = None
        if self.version == 2:
            mask = nn.sigmoid(branch[..., 2 * taps :].astype(jnp.float32))
        outputs = deform_conv2d(
            inputs.astype(self.dtype), branch[..., : 2 * taps], kernel.astype(self.dtype),
            mask=mask, stride=self.strides, padding=self.padding, groups=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            outputs = outputs + bias.astype(self.dtype)
        return outputs
