"""A trained detector as a TensorFlow SavedModel, which takes photos as they lie in files.

TensorFlow decodes, resizes and pads; the detector is one operation, XlaCallModule, that holds JAX's
program, with weights as variables beside it. Each call takes one photo. Its signatures:

    serving_default  {"photo": text}, the bytes of a JPEG, PNG, GIF or BMP, to its detections: boxes
                     (n, 4) normalised, scores, classes, labels (n,), masks (n, S, S) probabilities
    canvas_HxW       {"image": uint8 (1, H, W, 3), "image_size": float32 (1, 2)} to what
                     `detection.serving` gives; one signature for each canvas

`jax2tf` would write the same operation, but in a version of StableHLO that TensorFlow's releases
cannot read yet, so the operation is made here.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tensorflow as tf
from jax import export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from tensorflow.compiler.tf2xla.python import xla

from common.data.canvases import Canvas
from common.masks.probability import PROBABILITY_ONE
from common.training.preemption import stoppable
from detection.serving import Detect, exported_for_one_photo

STABLEHLO_VERSION = "1.9.0"  # of February 2025; each release reads all versions of the last years


def save(
    detect: Detect,
    variables: dict,
    folder: str | os.PathLike,
    canvases: Sequence[tuple[Canvas, Canvas]],
    labels: Sequence[str],
    platforms: Sequence[str],
) -> None:
    """Writes a SavedModel.

    Args:
      detect: of `detector_function`.
      variables: of the model, NumPy arrays.
      folder: to write.
      canvases: height, width without and with padding, of landscape and of portrait photos; one
        where they are the same.
      labels: of the classes.
      platforms: the devices that it can run on.

    Raises:
      Stopped: the command was asked to end.
    """
    module = tf.Module()
    module.weights = [tf.Variable(x, trainable=False) for x in jax.tree.leaves(variables)]
    signatures: dict[str, Any] = {}
    for _, shape in stoppable(canvases):
        program = operation(exported_for_one_photo(detect, variables, shape, platforms))
        signatures[f"canvas_{shape[0]}x{shape[1]}"] = tf.function(
            lambda image, image_size, program=program: program(*module.weights, image, image_size),
            input_signature=[
                tf.TensorSpec((1, *shape, 3), tf.uint8, "image"),
                tf.TensorSpec((1, 2), tf.float32, "image_size"),
            ],
            autograph=False,
        )
    by_canvas = list(signatures.values())

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, "photo")], autograph=False)
    def detect_photo(photo):
        image = tf.io.decode_image(photo, channels=3, expand_animations=False)
        image = tf.ensure_shape(image, (None, None, 3))
        landscape, portrait = (
            lambda place=place: detected(by_canvas[place], image, *canvases[place])
            for place in (0, len(canvases) - 1)
        )
        size = tf.shape(image)
        return tf.cond(size[0] > size[1], portrait, landscape)

    def detected(function, image, canvas, shape):
        """The real detections of a photo on a canvas."""
        size = tf.cast(tf.shape(image)[:2], tf.float32)
        ratio = tf.reduce_min(tf.constant(canvas, tf.float32) / size)
        content = tf.maximum(tf.cast(tf.floor(size * ratio + 0.5), tf.int32), 1)
        small = tf.image.resize(image, content, antialias=True)
        small = tf.cast(tf.round(small), tf.uint8)
        small = tf.image.pad_to_bounding_box(small, 0, 0, *shape)
        content = tf.cast(content, tf.float32)
        found = function(small[None], content[None])
        rows = found["valid"][0]
        result = {name: tf.boolean_mask(found[name][0], rows) for name in found if name != "valid"}
        sides = tf.gather(content, [1, 0, 1, 0])
        result["boxes"] = tf.clip_by_value(result["boxes"] / sides, 0.0, 1.0)
        result["labels"] = tf.gather(tf.constant(list(labels)), result["classes"])
        if "masks" in result:
            result["masks"] = tf.cast(result["masks"], tf.float32) / PROBABILITY_ONE
        return result

    signatures["serving_default"] = detect_photo
    tf.saved_model.save(module, os.fspath(folder), signatures=signatures)


def operation(program: export.Exported) -> Callable[..., Any]:
    """A function of TensorFlow's tensors, the leaves of a program's arguments."""
    older = portable(program.mlir_module_serialized)
    outputs = program.out_avals

    def call(*arguments):
        found = xla.call_module(
            [arguments[place] for place in program.module_kept_var_idx],
            version=program.calling_convention_version,
            module=older,
            Tout=[tf.as_dtype(output.dtype) for output in outputs],
            Sout=[output.shape for output in outputs],
            platforms=[platform.upper() for platform in program.platforms],
        )
        return jax.tree.unflatten(program.out_tree, found)

    return call


def portable(program: bytes) -> bytes:
    """The same program in `STABLEHLO_VERSION`."""
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, program)
        return stablehlo.serialize_portable_artifact(module, STABLEHLO_VERSION)
