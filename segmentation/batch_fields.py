"""Names, shapes and types of the fields of a batch that segmenters read."""

import jax
import jax.numpy as jnp

from segmentation.crops.settings import DataSettings

INFERENCE_FIELDS = ("image", "image_size", "image_valid", "classes")


def batch_shapes(canvas: tuple[int, int], num_crops: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a training batch on a canvas of this height and width."""
    b, (height, width) = num_crops, canvas
    return {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "classes": jax.ShapeDtypeStruct((b,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((b, height, width), jnp.uint8),
        "mask_valid": jax.ShapeDtypeStruct((b, height, width), jnp.bool_),
    }


def train_shapes(data: DataSettings, num_crops: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a training batch on the largest canvas."""
    return batch_shapes(max(data.canvases, key=lambda size: size[0] * size[1]), num_crops)


def init_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    return batch_shapes((32, 32), 1)
