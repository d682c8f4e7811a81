"""The mask head (Mask R-CNN, He et al. 2017, section 3): outlines the object in a box.

RoIAlign of the box, convolutions, a transposed convolution that doubles the side, and one logit a
pixel and class. Only the logits of the RoI's own class are ever computed: the last layer's kernel
is gathered by class before it meets the features, so that 1,230 classes cost what one costs.

Shape legend
  B  images
  R  boxes per image: sampled RoIs in training, detections in inference
  N  boxes of all images
  P  pooled side (14); S = 2 P, side of a mask
  C  channels of the pyramid, D of the head's layers
  K  classes; 1 where all classes share a mask
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.nn.layers.conv import he_normal_fan_out
from common.nn.layers.norm import Norm
from common.nn.xla_cpu.present_rows import Layer as RowLayer
from common.nn.xla_cpu.present_rows import map_present
from common.nn.xla_cpu.winograd import small_conv

PREDICTOR_INIT = nn.initializers.normal(0.001)


class Layer(NamedTuple):
    """Parameters of a layer."""

    kernel: Float[Array, "... D"]
    bias: Float[Array, " D"]


class Parameters(nn.Module):
    """`kernel` and `bias` (zeros without) of a layer, which a function applies."""

    shape: tuple[int, ...]
    init: Callable
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> Layer:
        kernel = self.param("kernel", self.init, self.shape)
        if not self.use_bias:
            return Layer(kernel, jnp.zeros(self.shape[-1:], kernel.dtype))
        return Layer(kernel, self.param("bias", nn.initializers.zeros_init(), self.shape[-1:]))


class FrozenNorm(nn.Module):
    """`Norm` of kind 'frozen' as what it multiplies by and what it adds, which never change."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        shape = (self.channels,)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32).value
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32).value
        multiplier = scale * jax.lax.rsqrt(var + Norm.epsilon)
        return jax.lax.stop_gradient((multiplier, bias - mean * multiplier))


class MaskHead(nn.Module):
    """Logits of a mask for each box.

    Attributes:
      num_masks: K.
      width: D.
      num_convs: convolutions of 3x3 before the transposed one.
      norm: after each of them: "none", or "frozen".
      dtype: of convolutions and matmuls.
    """

    num_masks: int
    width: int = 256
    num_convs: int = 4
    norm: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        pooled: Float[Array, "B R P P C"],
        classes: Int[Array, "B R"],
        present: Bool[Array, "B R"],
    ) -> Float[Array, "B R S S"]:
        """Logits of each box's class, float32; zeros where the box is not `present`."""
        channels, he = pooled.shape[-1], he_normal_fan_out()
        convs = [
            self._conv(i + 1, (3, 3, self.width if i else channels, self.width))
            for i in range(self.num_convs)
        ]
        channels = self.width if convs else channels
        deconv = Parameters((2, 2, channels, self.width), he, name="deconv")()
        predictor = Parameters((self.width, self.num_masks), PREDICTOR_INIT, name="predictor")()

        if self.num_masks == 1:
            classes = jnp.zeros_like(classes)
        result = map_present(
            mask_layers(convs, deconv, predictor),
            present.reshape(-1),
            pooled.reshape(-1, *pooled.shape[2:]).astype(self.dtype),
            (classes.reshape(-1),),
        )
        return result.reshape(*classes.shape, *result.shape[1:])

    def _conv(self, number: int, shape: tuple[int, ...]) -> Layer:
        """A convolution, with its norm multiplied in; made in the scope of `__call__`."""
        name, init = f"conv{number}", he_normal_fan_out()
        if self.norm == "none":
            return Parameters(shape, init, name=name)()
        kernel = Parameters(shape, init, use_bias=False, name=name)().kernel
        multiplier, offset = FrozenNorm(self.width, name=f"norm{number}")()
        return Layer(kernel * multiplier, offset)


def mask_layers(convs: list[Layer], deconv: Layer, predictor: Layer) -> list[RowLayer]:
    """The layers of the head for `map_present`; all but the first begin with the activation.

    They compute in the type of their rows; logits are float32.
    """
    layers = [(convolve, conv) for conv in convs] + [(outline, (deconv, predictor))]
    return [layers[0], *((functools.partial(activated, f), layer) for f, layer in layers[1:])]


def activated(function: Callable[..., Array], parameters: Any, x: Array, classes: Array) -> Array:
    """`function` of rectified rows."""
    return function(parameters, nn.relu(x), classes)


def convolve(
    layer: Layer, x: Float[Array, "N P P C"], classes: Int[Array, " N"]
) -> Float[Array, "N P P D"]:
    """A convolution of 3x3."""
    del classes
    return small_conv(x, layer.kernel.astype(x.dtype)) + layer.bias.astype(x.dtype)


def outline(
    layers: tuple[Layer, Layer], x: Float[Array, "N P P C"], classes: Int[Array, " N"]
) -> Float[Array, "N S S"]:
    """The transposed convolution, and the logits of each row's class.

    A transposed convolution of 2x2 with stride 2 makes four pixels of each cell by a matmul each.
    They are put in their places after the last layer, when there is one number a pixel.
    """
    (deconv, predictor), dtype = layers, x.dtype
    count, side, _, channels = x.shape
    kernel = deconv.kernel.transpose(2, 0, 1, 3).reshape(channels, -1).astype(dtype)
    x = (x.reshape(-1, channels) @ kernel).reshape(count, side * side * 4, -1)
    x = nn.relu(x + deconv.bias.astype(dtype))
    columns = jnp.take(predictor.kernel.T, classes, axis=0).astype(dtype)
    logits = jnp.einsum("npd,nd->np", x, columns, preferred_element_type=jnp.float32)
    logits = logits + jnp.take(predictor.bias, classes)[:, None]
    logits = logits.reshape(count, side, side, 2, 2).transpose(0, 1, 3, 2, 4)
    return logits.reshape(count, 2 * side, 2 * side)
