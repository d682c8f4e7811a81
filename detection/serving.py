"""A trained detector as one function of pixels, and as programs that need none of this code.

Shape legend
  B     images
  H, W  canvas, pixels
  D     detections of an image
  S     side of a mask
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, UInt8

from common.data.canvases import Canvas

PLATFORMS = ("cpu", "cuda", "tpu")

Detect = Callable[..., dict[str, Array]]


def detector_function(model: nn.Module) -> Detect:
    """What inference computes, of weights, canvases and the sizes of their content."""

    def detect(
        variables: dict, image: UInt8[Array, "B H W 3"], image_size: Float[Array, "B 2"]
    ) -> dict[str, Array]:
        """boxes (B,D,4) canvas pixels, scores, classes, valid (B,D), and masks uint16 (B,D,S,S)
        where the model has a mask head."""
        image_valid = jnp.ones(image.shape[:1], bool)
        batch = {"image": image, "image_size": image_size, "image_valid": image_valid}
        found: Any = model.apply(variables, batch, train=False)
        return found

    return detect


def exported_with_weights(
    detect: Detect, variables: dict, shape: Canvas, platforms: Sequence[str] = PLATFORMS
) -> export.Exported:
    """The function of image and image_size, for any number of images; the weights are in it."""
    (count,) = export.symbolic_shape("b")
    program = jax.jit(lambda image, image_size: detect(variables, image, image_size))
    return export.export(program, platforms=platforms)(*_pixels(count, shape))


def exported_for_one_photo(
    detect: Detect, variables: dict, shape: Canvas, platforms: Sequence[str] = PLATFORMS
) -> export.Exported:
    """The function of variables, image and image_size, for one image."""
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    return export.export(jax.jit(detect), platforms=platforms)(weights, *_pixels(1, shape))


def _pixels(count: Any, shape: Canvas) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((count, *shape, 3), jnp.uint8),
        jax.ShapeDtypeStruct((count, 2), jnp.float32),
    )
