"""Photos at several sizes, grouped by format: what test-time augmentation looks at.

A canvas serves photos of one format only: landscape or portrait, and no longer than one of a few
ratios of long to short side. So a handful of static shapes wastes little on padding. A photo is
read once and drawn at each size from its bytes; the format is that of the photo itself, whatever
the annotations say.

Shape legend: B photos of a block, b of them in one batch, H, W padded canvas.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt8

from common.data import images, placement
from common.data.batches import Example, Fields, stack_examples
from common.data.dataset import Dataset
from common.data.photo_errors import PhotoErrors
from common.data.workers.pool import worker_count
from common.data.workers.sinks import Sink
from common.io.parallel import map_ordered
from common.io.parallel import num_threads as thread_count

_TOLERATED = 1.01  # a photo longer than its canvas by less than this is rather shrunk a little


class Photos(Protocol):
    """Photos by number; threads share them."""

    def name(self, index: int) -> str:
        """What errors call a photo."""

    def read(self, index: int) -> Callable[[], images.Photo]:
        """Reads a photo; returns what opens it, anew at each call, and can be pickled.

        Raises:
          ImageError: it cannot be read.
        """


class DatasetPhotos:
    """Those of a dataset, as large as it says."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def name(self, index: int) -> str:
        return self._dataset.image_file(index)

    def read(self, index: int) -> Callable[[], images.Photo]:
        data = images.read_file(self.name(index))
        height, width = self._dataset.image_sizes[index].tolist()
        return functools.partial(images.open_photo, data, (height, width))


@dataclasses.dataclass(frozen=True)
class ViewBatch:
    """Some photos of a block at one size.

    Attributes:
      image_index: (B,) number of each photo of the block, -1: padding.
      place: (B,) position of each among the photos asked for, -1: padding.
      last: whether this is the last batch of the block.
      scale: which of the sizes.
      rows: (b,) the photos' places in the block.
      image: RGB, content top left, padding 0.
      image_size: height and width of the content.
      original_size: height and width of the photo as displayed.
      image_valid: False: padding, or a photo that could not be read.
    """

    image_index: Int64[np.ndarray, " B"]
    place: Int64[np.ndarray, " B"]
    last: bool
    scale: int
    rows: Int[np.ndarray, " b"]
    image: UInt8[np.ndarray, "b H W 3"]
    image_size: Float32[np.ndarray, "b 2"]
    original_size: Int32[np.ndarray, "b 2"]
    image_valid: Bool[np.ndarray, " b"]


def format_canvases(
    short_side: int, long_ratios: Sequence[float], max_long: int
) -> list[tuple[int, int]]:
    """Height, width of the canvas of each format: landscape, portrait for each ratio.

    Args:
      short_side: pixels.
      long_ratios: long side over short side, ascending.
      max_long: no canvas is longer.
    """
    longs = [min(round(short_side * ratio), max_long) for ratio in long_ratios]
    return [shape for long in longs for shape in ((short_side, long), (long, short_side))]


def choose_format(size: tuple[int, int], long_ratios: Sequence[float]) -> int:
    """Place in `format_canvases` of the format of a photo of this height, width."""
    height, width = size
    aspect = max(size) / min(size)
    fits = [place for place, ratio in enumerate(long_ratios) if aspect <= ratio * _TOLERATED]
    return 2 * (fits[0] if fits else len(long_ratios) - 1) + (height > width)


def view_batches(
    photos: Photos,
    indices: Int64[np.ndarray, " n"],
    canvases: Sequence[Sequence[tuple[int, int]]],
    long_ratios: Sequence[float],
    rows: Sequence[Sequence[Int[np.ndarray, " b"]]],
    errors: PhotoErrors,
    *,
    pad_multiple: int,
    num_processes: int = 1,
    num_threads: int = 0,
) -> Iterator[ViewBatch]:
    """Yields the photos block by block, and of each block all batches, scale by scale.

    The photos of a block have one format. Blocks come as they fill up; the last one of each format
    is padded.

    Args:
      photos: where to read them.
      indices: numbers of the photos; one may come several times.
      canvases: of each scale and format, height and width (`format_canvases`), or of each scale
        one for all formats.
      long_ratios: of the formats.
      rows: of each scale, the places in the block of the photos of each batch.
      errors: what becomes of unreadable photos.
      pad_multiple: canvases are padded up to multiples of it.
      num_processes: that draw the views, 0: automatic (`common.data.workers.pool.worker_count`).
      num_threads: of all of them; 0: twice as many as there are cores, at most 64 a process.

    Raises:
      UserError: a photo that cannot be read (unless `errors` skips it).
    """
    processes = worker_count(num_processes, len(indices) * len(rows))
    opened = map_ordered(
        lambda item: _open(photos, *item, errors),
        enumerate(np.asarray(indices).tolist()),
        threads=num_threads,
    )
    loader = _ViewLoader(_BrokenPhotos(errors))
    num_formats = len(canvases[0])

    def batches() -> Iterator[tuple[Callable[..., ViewBatch], list[_View]]]:
        for format_, block in _blocks(opened, long_ratios, num_formats, sum(map(len, rows[0]))):
            index = np.array([-1 if photo is None else photo.index for photo in block])
            place = np.array([-1 if photo is None else photo.place for photo in block])
            parts = [(scale, part) for scale, parts in enumerate(rows) for part in parts]
            for number, (scale, part) in enumerate(parts, start=1):
                canvas = canvases[scale][format_]
                shape = images.canvas_shape(canvas, pad_multiple)
                last = number == len(parts)
                describe = functools.partial(ViewBatch, index, place, last, scale, part)
                yield describe, [_View(block[row], canvas, shape) for row in part]

    described, drawn = itertools.tee(batches())
    arrays = stack_examples(
        loader,
        (views for _, views in drawn),
        processes=processes,
        threads=num_threads,
        ahead=2 * thread_count(num_threads, processes),
    )
    for (describe, _), batch in zip(described, arrays, strict=True):
        yield describe(**batch)


@dataclasses.dataclass(frozen=True)
class _Photo:
    place: int
    index: int
    name: str
    open: Callable[[], images.Photo]
    size: tuple[int, int]


def _open(photos: Photos, place: int, index: int, errors: PhotoErrors) -> _Photo | None:
    errors.count()
    try:
        open_photo = photos.read(index)
        return _Photo(place, index, photos.name(index), open_photo, open_photo().size)
    except images.ImageError as error:
        errors.skip(photos.name(index), error)
        return None


def _blocks(
    photos: Iterable[_Photo | None], long_ratios: Sequence[float], num_formats: int, block_size: int
) -> Iterator[tuple[int, list[_Photo | None]]]:
    """Format and photos of each block."""
    open_blocks: dict[int, list[_Photo | None]] = {}
    for photo in photos:
        if photo is None:
            continue
        format_ = choose_format(photo.size, long_ratios) if num_formats > 1 else 0
        block = open_blocks.setdefault(format_, [])
        block.append(photo)
        if len(block) == block_size:
            yield format_, open_blocks.pop(format_)
    for format_, block in sorted(open_blocks.items()):
        yield format_, block + [None] * (block_size - len(block))


@dataclasses.dataclass(frozen=True)
class _View:
    """A photo (None: padding) at one size: its canvas, and the canvas padded."""

    photo: _Photo | None
    canvas: tuple[int, int]
    shape: tuple[int, int]


class _BrokenPhotos(Sink):
    """Those that cannot be decoded: each counts once, however many views it has."""

    def __init__(self, errors: PhotoErrors):
        self.errors = errors
        self._places: set[int] = set()
        self._lock = threading.Lock()

    def add(self, place: int, name: str, error: images.ImageError) -> None:
        with self._lock:
            known = place in self._places
            self._places.add(place)
        if not known:
            self.errors.skip(name, error)


class _ViewLoader:
    """Draws views."""

    def __init__(self, broken: _BrokenPhotos):
        self.photo_errors, self._broken = broken.errors, broken

    def fields(self, slot: _View) -> Fields:
        return {
            "image": ((*slot.shape, 3), np.uint8),
            "image_size": ((2,), np.float32),
            "original_size": ((2,), np.int32),
            "image_valid": ((), np.bool_),
        }

    def load(self, slot: _View, example: Example) -> None:
        photo = slot.photo
        if photo is None:
            return
        # Opened anew: the decoder's size reduction is a state of the handle.
        opened = photo.open()
        geometry = placement.fit(opened.size, slot.canvas)
        height, width = geometry.content
        try:
            example["image"][:height, :width] = placement.draw_content(opened, geometry)
        except images.ImageError as error:
            self._broken.add(photo.place, photo.name, error)
            return
        example["image_size"][:] = geometry.content
        example["original_size"][:] = opened.size
        example["image_valid"][()] = True
