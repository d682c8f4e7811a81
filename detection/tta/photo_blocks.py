"""Blocks of photos that are looked at together: their canvases, batches and photos.

Shape legend: B photos of a block, b of them in one batch.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from common.data.canvases import orientations
from common.data.photo_errors import PhotoErrors
from common.data.views import Photos, ViewBatch, format_canvases, view_batches
from detection.settings import RunSettings


class Layout(NamedTuple):
    """How blocks are cut into batches.

    Attributes:
      canvases: of each scale and format, height and width.
      rows: of each scale, places in the block of the photos of each batch.
      long_ratios: long side over short side of the formats.
    """

    canvases: list[list[tuple[int, int]]]
    rows: list[list[np.ndarray]]
    long_ratios: tuple[float, ...]


def make_layout(settings: RunSettings, num_devices: int, num_local: int) -> Layout:
    """Of `config.test_time`, or without any views a batch on `data.canvas` for each block.

    Where the canvas is larger than `data.canvas`, fewer photos go through at a time.

    Args:
      settings: of the run.
      num_devices: of all processes.
      num_local: of this one.
    """
    views = settings.test_time
    per_device = -(-settings.evaluation.batch_size // num_devices)
    if not views.is_on:
        short, long = settings.data.canvas
        formats = list(dict.fromkeys(orientations(settings.data.canvas)))
        return Layout([formats], [[np.arange(num_local * per_device)]], (long / short,))
    canvases = [format_canvases(scale, views.long_ratios, views.max_long) for scale in views.scales]
    room = per_device * np.prod(settings.data.canvas)
    limits = [int(room // np.prod(formats[-1])) for formats in canvases]
    rows = [batch_rows(per_device, num_local, limit) for limit in limits]
    return Layout(canvases, rows, views.long_ratios)


def batch_rows(per_device: int, num_devices: int, limit: int) -> list[np.ndarray]:
    """Places in a block of the photos of each batch: b of each device's n.

    b is the largest divisor of n = `per_device` up to `limit`. Each device gets the photos that it
    also has in the block, so that batches are put together without traffic.
    """
    parts = next(
        p
        for p in range(1, per_device + 1)
        if per_device % p == 0 and (per_device // p <= limit or p == per_device)
    )
    places = np.arange(num_devices * per_device).reshape(num_devices, parts, -1)
    return [places[:, part].ravel() for part in range(parts)]


def open_views(
    settings: RunSettings,
    photos: Photos,
    indices: Int64[np.ndarray, " n"],
    layout: Layout,
    errors: PhotoErrors,
) -> Iterator[ViewBatch]:
    """The batches of all blocks of photos, as `common.data.views.view_batches` gives them."""
    return view_batches(
        photos,
        indices,
        layout.canvases,
        layout.long_ratios,
        layout.rows,
        errors,
        pad_multiple=settings.data.pad_multiple,
        num_processes=settings.data.num_processes,
        num_threads=settings.data.num_threads,
    )


@dataclasses.dataclass(frozen=True)
class BlockPhotos:
    """The photos of a block.

    Attributes:
      index: (B,) number of the photo, such as its row of a dataset, -1: padding.
      place: (B,) position among the photos that were asked for, -1: padding.
      readable: (B,) False: padding, or one that could not be read.
      size: (B, 2) height and width.
    """

    index: Int64[np.ndarray, " B"]
    place: Int64[np.ndarray, " B"]
    readable: Bool[np.ndarray, " B"]
    size: Int32[np.ndarray, "B 2"]

    @classmethod
    def of(cls, batch: ViewBatch) -> "BlockPhotos":
        """Those of the block that a batch is of, before any is read."""
        index = batch.image_index
        return cls(index, batch.place, index >= 0, np.zeros((len(index), 2), np.int32))

    def add(self, batch: ViewBatch) -> None:
        """Takes note of a batch of the block."""
        self.readable[batch.rows] &= batch.image_valid
        self.size[batch.rows] = batch.original_size
