"""Names, shapes and types of the fields of a batch that detectors and refiners read."""

import math

import jax
import jax.numpy as jnp

from common.data import canvases
from common.data.canvases import Canvas
from common.data.settings import DataSettings

INFERENCE_FIELDS = ("image", "image_size", "image_valid")
REFINER_FIELDS = (*INFERENCE_FIELDS, "proposals", "proposal_valid")


def train_shapes(
    data: DataSettings, num_images: int, num_classes: int, shape: Canvas | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a training batch of `num_images`, on the largest shape of the run or on another."""
    height, width = shape or max(canvases.train_canvases(data), key=math.prod)
    b, m, g, k, p = num_images, data.max_boxes, data.max_ignore, num_classes, data.max_proposals
    fields = {
        "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((b, 2), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((b,), jnp.bool_),
        "gt_boxes": jax.ShapeDtypeStruct((b, m, 4), jnp.float32),
        "gt_classes": jax.ShapeDtypeStruct((b, m), jnp.int32),
        "gt_valid": jax.ShapeDtypeStruct((b, m), jnp.bool_),
        "ignore_boxes": jax.ShapeDtypeStruct((b, g, 4), jnp.float32),
        "ignore_valid": jax.ShapeDtypeStruct((b, g), jnp.bool_),
    }
    if s := data.mask_size:
        fields["gt_masks"] = jax.ShapeDtypeStruct((b, m, s, s // 8), jnp.uint8)
        fields["gt_has_mask"] = jax.ShapeDtypeStruct((b, m), jnp.bool_)
    if data.image_labels:
        fields["labels"] = jax.ShapeDtypeStruct((b, k), jnp.int8)
    if data.some_unknown:
        fields["class_known"] = jax.ShapeDtypeStruct((b, k), jnp.bool_)
    if p:
        fields["proposals"] = jax.ShapeDtypeStruct((b, p, 4), jnp.float32)
        fields["proposal_valid"] = jax.ShapeDtypeStruct((b, p), jnp.bool_)
    return fields


def label_shapes(
    data: DataSettings, num_images: int, num_classes: int, shape: Canvas | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of a batch of a step of image-level labels; see `train_shapes`."""
    fields = train_shapes(data.of_label_steps, num_images, num_classes, shape)
    names = (*INFERENCE_FIELDS, "labels", "class_known")
    return {name: fields[name] for name in names if name in fields}


def program_shapes(
    data: DataSettings, num_images: int, num_classes: int
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Of the batches of all programs that a run trains with: of each canvas and kind of step."""
    programs = [
        train_shapes(data, num_images, num_classes, shape)
        for shape in canvases.train_canvases(data)
    ]
    if data.label_steps.share:
        programs += [
            label_shapes(data, num_images, num_classes, shape)
            for shape in canvases.train_canvases(data.of_label_steps)
        ]
    return programs


def init_shapes(data: DataSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """The smallest batch that parameters can be made with; they do not depend on the canvas."""
    by_class = ("labels", "class_known")
    fields = train_shapes(data, 1, 1, (64, 64))
    return {name: shape for name, shape in fields.items() if name not in by_class}
