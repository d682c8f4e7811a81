"""What photos need of TensorFlow: parts of JPEG files, and files behind addresses such as gs://.

It takes seconds to import and is needed by few, so it is imported when it is first called for;
where it is not installed, all else works.
"""

import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8

from common.data import remote
from common.data.image_file import ImageError

_LOCK = threading.Lock()  # held while it is imported and told to leave the accelerators


def installed() -> bool:
    return _tensorflow() is not None


def read_address(path: str) -> bytes:
    """Content of the file behind an address such as gs://bucket/name.

    While the storage is busy, it is asked again for half a minute (`common.data.remote`).

    Raises:
      ImageError: it cannot be read.
    """
    tf = _tensorflow()
    if tf is None:
        raise ImageError("only TensorFlow reads such addresses, and it is not installed")

    def read() -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()

    # What else passes by itself TensorFlow repeats on its own, for some hundred seconds.
    transient = (tf.errors.ResourceExhaustedError, tf.errors.InternalError)
    try:
        return remote.patiently(read, path, transient)
    except tf.errors.OpError as error:
        raise ImageError(error.message) from error


def cut_jpeg(
    data: bytes, reduction: int, window: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "h w 3"] | None:
    """Decodes no more than a window (left, top, right, bottom) of a JPEG at 1 / reduction of its
    size; None where the data are damaged."""
    left, top, right, bottom = window
    tf = _tensorflow()
    try:
        pixels = tf.io.decode_and_crop_jpeg(
            data,
            [top, left, bottom - top, right - left],
            channels=3,
            ratio=reduction,
            dct_method="INTEGER_ACCURATE",
        )
    except tf.errors.InvalidArgumentError:
        return None
    return pixels.numpy()


def _tensorflow() -> Any:
    """The module, None where it is missing. It only reads here; left alone it would take the memory
    of the accelerators."""
    with _LOCK:
        try:
            import tensorflow as tf
        except ImportError:
            return None
        for kind in ("GPU", "TPU"):
            if tf.config.get_visible_devices(kind):
                tf.config.set_visible_devices([], kind)
        return tf
