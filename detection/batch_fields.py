"""Names, shapes and types of the fields of a batch that detectors and refiners read."""

import jax
import jax.numpy as jnp

from common.data.images import canvas_shape
from common.data.settings import DataSettings

INFERENCE_FIELDS = ("image", "image_size", "image_valid")
REFINER_FIELDS = (*INFERENCE_FIELDS, "proposals", "proposal_valid")


def train_shapes(
    data: DataSettings, num_images: int, canvas: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a training batch of `num_images`, on the canvas of the settings or on another."""
    height, width = canvas_shape(canvas or data.canvas, data.pad_multiple)
    b, m, p = num_images, data.max_boxes, data.max_proposals
    proposals = {
        "proposals": jax.ShapeDtypeStruct((b, p, 4), jnp.float32),
        "proposal_valid": jax.ShapeDtypeStruct((b, p), jnp.bool_),
    }
    return {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "gt_boxes": jax.ShapeDtypeStruct((b, m, 4), jnp.float32),
        "gt_classes": jax.ShapeDtypeStruct((b, m), jnp.int32),
        "gt_valid": jax.ShapeDtypeStruct((b, m), jnp.bool_),
        **(proposals if p else {}),
    }


def init_shapes(data: DataSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    return train_shapes(data, 1, canvas=(64, 64))
