"""Deformable convolution (Dai et al. 2017) and its modulated form (Zhu et al. 2019, "v2").

Each kernel element samples the input at a point of its own, which the layer predicts. All samples
of one kernel element make a map to which that element is applied as a 1x1 convolution; the sum over
the elements is the output. Only the maps of one element exist at a time, and backward samples anew
(it has to read the cells in any case, for the gradient of the offsets).

Shapes: B batch, H W input height and width, h w output height and width, C input channels,
D output channels, k kernel side, T = k * k kernel elements ("taps") row by row, N = h * w.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from common.geometry import bilinear
from common.nn.layers.conv import Conv, Padding, as_pair, explicit_pads, he_normal_fan_out

_BORDER = "zero"
# Input channels of a matmul where groups are merged.
_PART_CHANNELS = {"corners": 64, "quads": 128}


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
    sides, strides, dilations = kernel.shape[:2], as_pair(stride), as_pair(dilation)
    reach = [(side - 1) * step + 1 for side, step in zip(sides, dilations, strict=True)]
    pads = explicit_pads(padding, x.shape[1:3], reach, strides)
    size = tuple(
        (x.shape[axis + 1] + sum(pads[axis]) - reach[axis]) // strides[axis] + 1 for axis in (0, 1)
    )
    taps = sides[0] * sides[1]
    for name, array, channels in (("offsets", offsets, 2 * taps), ("mask", mask, taps)):
        if array is not None and array.shape != (x.shape[0], *size, channels):
            expected = (x.shape[0], *size, channels)
            raise ValueError(f"{name} of shape {array.shape}, expected {expected}")

    # (B, T, N): TPU would pad an axis of 2 or of T, were it the last, to 128.
    offsets = offsets.astype(jnp.float32).reshape(x.shape[0], -1, taps, 2)
    y_points, x_points = jnp.moveaxis(offsets, (3, 2), (0, 2))
    rows, columns = (
        jnp.arange(size[axis])[:, None] * strides[axis]
        - pads[axis][0]
        + jnp.arange(sides[axis]) * dilations[axis]
        for axis in (0, 1)
    )
    shape = (*size, *sides)
    y_points += jnp.broadcast_to(rows[:, None, :, None], shape).reshape(-1, taps).T
    x_points += jnp.broadcast_to(columns[None, :, None, :], shape).reshape(-1, taps).T
    if mask is not None:
        mask = jnp.moveaxis(mask.astype(jnp.float32).reshape(x.shape[0], -1, taps), 2, 1)
    kernel = jnp.swapaxes(kernel.reshape(taps, *kernel.shape[2:]), 1, 2)
    return _deform_conv(method, size, groups, x, y_points, x_points, mask, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _deform_conv(method, size, groups, x, y_points, x_points, mask, kernel):
    """`y_points`, `x_points`, `mask` (B, T, N); `kernel` (T, D, C / groups); `size` (h, w)."""

    def forward(method, kernel, *batch):
        def of_image(image):
            x, *taps = image
            table = bilinear.make_table(method, [x])

            def add_tap(total, tap):
                *point, mask, kernel = tap
                place = bilinear.locate(method, _BORDER, (x.shape[:2],), None, *point)
                weights = _masked(place.weights, mask)
                samples = bilinear.interpolate(weights, bilinear.read(table, place.rows))
                samples = samples.astype(x.dtype)
                return total + _product(method, groups, samples, kernel), None

            total = jnp.zeros((size[0] * size[1], kernel.shape[1]), jnp.float32)
            total, _ = lax.scan(add_tap, total, (*taps, kernel))
            return total.astype(x.dtype).reshape(*size, -1)

        return lax.map(of_image, batch)

    return bilinear.by_platform(method, forward, kernel, x, y_points, x_points, mask)


def _deform_conv_forward(method, size, groups, *arrays):
    return _deform_conv(method, size, groups, *arrays), arrays


def _deform_conv_backward(method, size, groups, saved, grad):
    *batch, kernel = saved

    def backward(method, kernel, *batch):
        def of_image(image):
            x, *taps, grad = image
            table = bilinear.make_table(method, [x])
            grad = grad.reshape(-1, grad.shape[-1])

            def add_tap(total, tap):
                *point, mask, kernel = tap
                place = bilinear.locate(method, _BORDER, (x.shape[:2],), None, *point)
                cells = bilinear.read(table, place.rows)
                weights = _masked(place.weights, mask)
                samples = bilinear.interpolate(weights, cells).astype(x.dtype)
                product = functools.partial(_product, method, groups)
                samples_grad, kernel_grad = jax.vjp(product, samples, kernel)[1](grad)
                samples_grad = samples_grad.astype(jnp.float32)
                total = bilinear.add(total, place.rows, weights, samples_grad)
                weights_grad = bilinear.contract(cells, samples_grad)
                mask_grad = None if mask is None else bilinear.dot(place.weights, weights_grad)
                weights_grad = _masked(weights_grad, mask)
                y_grad = bilinear.dot(place.y_slopes, weights_grad)
                x_grad = bilinear.dot(place.x_slopes, weights_grad)
                return total, (y_grad, x_grad, mask_grad, kernel_grad)

            total = jnp.zeros(table.shape, jnp.float32)
            total, grads = lax.scan(add_tap, total, (*taps, kernel))
            (map_grad,) = bilinear.fold_table(method, (x.shape[:2],), total)
            return map_grad.astype(x.dtype), *grads

        *grads, kernel_grad = lax.map(of_image, batch)
        kernel_grad = jnp.sum(kernel_grad, axis=0, dtype=jnp.float32)
        return *grads, kernel_grad.astype(kernel.dtype)

    return bilinear.by_platform(method, backward, kernel, *batch, grad)


_deform_conv.defvjp(_deform_conv_forward, _deform_conv_backward)


def _masked(weights, mask):
    return weights if mask is None else tuple(weight * mask for weight in weights)


def _product(method, groups, samples, kernel):
    """(N, D): samples (N, C) times the kernel (D, C / groups) of a tap.

    Neighbouring groups are merged, with zeros between them, until they fill the matrix unit of TPU
    or make a matmul that XLA:CPU has a fast kernel for.
    """
    group_channels = kernel.shape[1]
    limit = max(_PART_CHANNELS[method] // group_channels, 1)
    merged = max(m for m in range(1, min(limit, groups) + 1) if groups % m == 0)
    if merged == groups == 1:
        return _times_transposed(samples, kernel)
    parts = groups // merged
    blocks = kernel.reshape(parts, merged, -1, group_channels)
    blocks = jnp.einsum("pmdc,nm->pmdnc", blocks, jnp.eye(merged, dtype=kernel.dtype))
    blocks = blocks.reshape(parts, -1, merged * group_channels)
    samples = jnp.split(samples, parts, axis=-1)
    return jnp.concatenate(list(map(_times_transposed, samples, blocks)), axis=-1)


def _times_transposed(a, b):
    # Its gradients are matmuls without transposed results, which would cost XLA:CPU as much again.
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())))


class DeformConv(Conv):
    """Takes the place of `Conv`: same fields and parameters, and a convolution `offset` beside it.

    The offsets start at zero, as an ordinary convolution; in version 2 the factors of the samples
    start at sigmoid(0) = 0.5, which halves the output (Zhu et al. 2019, section 3.2).

    Attributes:
      version: 1 offsets, 2 offsets and a factor for each sample.
    """

    version: int = 1

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if self.version not in (1, 2):
            raise ValueError(f"deformable convolution version {self.version}, expected 1 or 2")
        size = as_pair(self.kernel_size)
        taps = size[0] * size[1]
        shape = (*size, inputs.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init or he_normal_fan_out(self.groups), shape)
        branch = Conv(
            (self.version + 1) * taps,
            size,
            self.strides,
            self.padding,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros_init(),
            name="offset",
        )(inputs)
        mask = None
        if self.version == 2:
            mask = nn.sigmoid(branch[..., 2 * taps :].astype(jnp.float32))
        outputs = deform_conv2d(
            inputs.astype(self.dtype),
            branch[..., : 2 * taps],
            kernel.astype(self.dtype),
            mask=mask,
            stride=self.strides,
            padding=self.padding,
            groups=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            outputs = outputs + bias.astype(self.dtype)
        return outputs
