"""The convolution that every network here is made of: one place to choose how it is computed.

Shapes: B batch, H W input height and width, h w output height and width, C input channels,
D output channels (`features`), k kernel side.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common.nn.xla_cpu.dense_conv import Pads, dense_conv, general_conv
from common.nn.xla_cpu.depthwise import depthwise_conv
from common.nn.xla_cpu.grouped_conv import grouped_conv

Padding = str | int | Sequence[tuple[int, int]]


def he_normal_fan_out(groups: int = 1) -> Callable:
    """Normal initialiser with variance 2 / (kernel area x outputs that one input feeds)."""

    def init(key, shape, dtype=jnp.float32):
        fan_out = shape[0] * shape[1] * shape[-1] // groups
        return jax.random.normal(key, shape, dtype) * jnp.sqrt(2.0 / fan_out).astype(dtype)

    return init


def conv2d(
    inputs: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C_per_group D"],
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    groups: int = 1,
) -> Float[Array, "B h w D"]:
    """NHWC x HWIO convolution.

    `padding`: 'SAME' (TensorFlow's rule: depends on the size, extra row below), 'VALID', an int
    (that many rows on each side, torch's rule) or explicit ((top, bottom), (left, right)).
    """
    pads = explicit_pads(padding, inputs.shape[1:3], kernel.shape[:2], strides)
    return _conv2d(inputs, kernel, tuple(strides), pads, groups)


def explicit_pads(
    padding: Padding, size: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> Pads:
    """((top, bottom), (left, right)) of `padding` as `conv2d` takes it.

    `size` is the input's height and width, `window` the kernel's (its reach, if dilated).
    """
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, window, strides, padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _conv2d(inputs, kernel, strides, pads, groups):
    """Jitted so that the many equal convolutions of a network are traced and lowered once."""
    if groups == 1:
        return dense_conv(inputs, kernel, strides, pads)

    def on_cpu(inputs, kernel):
        if kernel.shape[2] == 1 and kernel.shape[3] == groups:
            return depthwise_conv(inputs, kernel, strides, pads)
        return grouped_conv(inputs, kernel, strides, pads, groups)

    default = functools.partial(general_conv, strides=strides, pads=pads, groups=groups)
    return jax.lax.platform_dependent(inputs, kernel, cpu=on_cpu, default=default)


class Conv(nn.Module):
    """2-D convolution with float32 parameters `kernel` (k, k, C / groups, D) and `bias` (D,)."""

    features: int
    kernel_size: int | tuple[int, int] = 3
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    groups: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable | None = None
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        size, strides = as_pair(self.kernel_size), as_pair(self.strides)
        shape = (*size, inputs.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init or he_normal_fan_out(self.groups), shape)
        outputs = conv2d(
            inputs.astype(self.dtype), kernel.astype(self.dtype), strides, self.padding, self.groups
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            outputs = outputs + bias.astype(self.dtype)
        return outputs


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
