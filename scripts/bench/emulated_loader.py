"""A loader for machines that one does not have: decoding takes time, but no core of this one.

All that the interpreter does for a photo is done: plans, files, headers, boxes, the calls of the
decoder (on a photo of few pixels), the copies of pixels. Only the time that decoding and resizing
of the real one take is slept through, in as many threads at a time as there are cores to emulate.
"""

import functools
import io
import threading
import time
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from common.data import images, placement
from common.data.examples import TrainingLoader

_SMALL = (12, 16)  # height, width


class EmulatedLoader(TrainingLoader):
    """See the module."""

    def __init__(self, *given: Any, cores: int, latency: float, draw_seconds: float):
        """Loads as a `TrainingLoader` of the arguments `given`.

        Args:
          cores: of each process.
          latency: seconds until a file begins to come.
          draw_seconds: that a core decodes and resizes a photo.
        """
        super().__init__(*given)
        self._cores, self._latency, self._draw_seconds = cores, latency, draw_seconds

    def _open(self, path: str, annotated_size: tuple[int, int]) -> images.Photo:
        time.sleep(self._latency)
        return super()._open(path, annotated_size)

    def _draw(
        self, photo: images.Photo, geometry: placement.Geometry
    ) -> UInt8[np.ndarray, "h w 3"]:
        small = images.open_photo(_small_photo())
        placement.draw_content(small, placement.fit(small.size, _SMALL[::-1], flip=geometry.flip))
        with _free_cores(self._cores):
            time.sleep(self._draw_seconds)
        return np.asarray(_drawn(geometry.content))


@functools.cache
def _free_cores(count: int) -> threading.Semaphore:
    return threading.Semaphore(count)


@functools.cache
def _small_photo() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", _SMALL[::-1], (90, 120, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


@functools.cache
def _drawn(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size[::-1], (90, 120, 60))
