"""Batches of crops for the segmenter: one instance a slot, cut out of its photo, with its mask.

Every crop of a step is a pure function of (seed, step, slot), as in `common.data.input`. The
batches of a run have few shapes: all crops of a batch lie on one of the canvases of the config.

A batch is a dictionary (b: crops of this host; H, W: canvas of this batch):
  image           uint8   (b, H, W, 3)  RGB, content top left, padding 0 (the model normalises)
  image_size      float32 (b, 2)        height, width of the content on the canvas
  image_valid     bool    (b,)          False: padding, or a photo or mask that could not be read
  mask            uint8   (b, H, W)     1: foreground
  mask_valid      bool    (b, H, W)     where the truth is known: inside the content, and inside the
                                        photo, whose corners a rotation brings into the crop
  classes         int32   (b,)
  instance_index  int64   (b,)          row of `dataset.boxes`, -1 in the padding of the last batch
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from common.data import images
from common.data.batches import Batches, StepMemo, local_batch
from common.data.box_shapes import photo_sizes
from common.data.cut import Cut
from common.data.dataset import Dataset
from common.data.photo_errors import PhotoErrors
from common.io.parallel import map_ordered
from segmentation.crops.examples import CropLoader, CropSlot, open_photo
from segmentation.crops.instances import find_instances
from segmentation.crops.plan import InstancePlan
from segmentation.crops.settings import DataSettings
from segmentation.crops.windows import CropSize, choose_canvas, clip_boxes, on_canvas, windows_of

_CHUNK = 1 << 16  # instances whose canvases are found at once

Crop = UInt8[np.ndarray, "h w 3"]


def train_batches(
    dataset: Dataset,
    plan: InstancePlan,
    settings: DataSettings,
    *,
    start_step: int = 0,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates over the batches of steps start_step ... start_step + num_steps - 1.

    Args:
      dataset: with masks.
      plan: from `crops.plan.make_plan`; its batch_size is that of all hosts together.
      settings: of on_image_error, num_processes, num_threads and prefetch.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.

    Raises:
      UserError: while iterating: a photo or mask that cannot be read (unless 'skip').
    """
    local = local_batch(plan.batch_size, process_index, process_count)
    planned = StepMemo(plan.batch)

    def slot(number: int) -> CropSlot:
        step, place = divmod(number, local)
        place += process_index * local
        crops = planned(step)
        return CropSlot(
            crops.canvas,
            int(crops.rows[place]),
            int(crops.images[place]),
            int(crops.classes[place]),
            crops.boxes[place],
            bool(crops.jittered[place]),
            float(crops.deviations[place]),
            crops.draws[place],
        )

    loader = CropLoader(dataset, plan.augmentation, settings.on_image_error)
    numbers = range(start_step * local, (start_step + num_steps) * local)
    return _batches(loader, slot, numbers, local, settings)


def eval_batches(
    dataset: Dataset,
    split: str,
    settings: DataSettings,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates once over the instances of a split, cut by their annotated boxes, canvas by canvas.

    Host p gets instances [p b, (p + 1) b) of each global batch: every instance is on exactly one
    host, all hosts make the same number of batches (`num_batches`), and what the last one of a
    canvas lacks is padded with instance_index -1, image_valid False. Of a range of short sides the
    middle is taken.

    Args and errors: as `train_batches`; batch_size counts the crops of all hosts together, and
    that of the settings plays no part.
    """
    local = local_batch(batch_size, process_index, process_count)
    size = settings.crop
    canvases = np.array(settings.canvases)
    instances = find_instances(dataset, split)
    chosen_canvases = [
        _canvas_of(dataset, instances.rows[part], instances.images[part], size, canvases)
        for part in (slice(i, i + _CHUNK) for i in range(0, len(instances), _CHUNK))
    ]
    choice = np.concatenate(chosen_canvases)
    # One row a batch, -1: padding.
    rows_of_canvas, canvas_of_batch = [], []
    for number in range(len(canvases)):
        chosen = np.flatnonzero(choice == number)
        padded = np.full(-(-len(chosen) // batch_size) * batch_size, -1, np.int64)
        padded[: len(chosen)] = chosen
        rows_of_canvas.append(padded.reshape(-1, batch_size))
        canvas_of_batch += [number] * len(rows_of_canvas[-1])
    members = np.concatenate(rows_of_canvas)

    def slot(number: int) -> CropSlot:
        batch, place = divmod(number, local)
        canvas = tuple(canvases[canvas_of_batch[batch]].tolist())
        member = members[batch, process_index * local + place]
        if member < 0:
            return CropSlot(canvas)
        row = int(instances.rows[member])
        image, class_ = int(instances.images[member]), int(instances.classes[member])
        return CropSlot(canvas, row, image, class_, dataset.boxes[row])

    loader = CropLoader(dataset, size, settings.on_image_error)
    return _batches(loader, slot, range(len(members) * local), local, settings)


def _batches(
    loader: CropLoader, slot: Any, numbers: range, batch_size: int, settings: DataSettings
) -> Batches:
    return Batches(
        loader,
        slot,
        numbers,
        batch_size,
        processes=settings.num_processes,
        num_threads=settings.num_threads,
        prefetch=settings.prefetch,
    )


def _canvas_of(
    dataset: Dataset,
    rows: Int64[np.ndarray, " n"],
    image_index: Int64[np.ndarray, " n"],
    size: CropSize,
    canvases: Int64[np.ndarray, "c 2"],
) -> Int64[np.ndarray, " n"]:
    """Number of the canvas of each box."""
    boxes = clip_boxes(dataset.boxes[rows], photo_sizes(dataset, image_index))
    return choose_canvas(windows_of(boxes, size).content, canvases)


@dataclasses.dataclass(frozen=True)
class View:
    """One way of cutting.

    Attributes:
      crop: size of the crops; of a range of short sides the middle is taken.
      canvases: allowed heights and widths.
    """

    crop: CropSize
    canvases: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class BoxBatch:
    """Crops of b boxes in one view.

    The batches of a block hold the same boxes in the same slots, one view after the other, so that
    voters meet without being kept.

    Attributes:
      view: place in the list of views.
      rows: (b,) the caller's row of each slot, -1 in padding.
      image_index: (b,) row of the dataset's images, -1 in padding.
      image, image_size: as in training.
      image_valid: False: padding, a photo that could not be read, or a box without area inside it.
      window: (b, 4) xmin, ymin, xmax, ymax in pixels of the photo, continuous, clipped to it: what
        the content shows.
      photo_size: (b, 2) height, width of the photo as displayed; of an unreadable one as annotated,
        0 where that is unknown.
    """

    view: int
    rows: Int64[np.ndarray, " b"]
    image_index: Int64[np.ndarray, " b"]
    image: UInt8[np.ndarray, "b H W 3"]
    image_size: Float32[np.ndarray, "b 2"]
    image_valid: Bool[np.ndarray, " b"]
    window: Float32[np.ndarray, "b 4"]
    photo_size: Int32[np.ndarray, "b 2"]


def box_batches(
    dataset: Dataset,
    image_index: Int64[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
    views: Sequence[View],
    *,
    batch_size: int,
    on_image_error: str = "fatal",
    num_threads: int = 0,
) -> Iterator[BoxBatch]:
    """Cuts given boxes; each photo is read and decoded once.

    Boxes that take the same canvases in all views share batches, which come as they fill up; the
    last ones are padded. At most a batch for each such group of canvases waits for more boxes,
    whatever the number of photos and boxes.

    Args:
      dataset: where the photos are listed.
      image_index: photo of each box; boxes of one photo lie together.
      boxes: normalised; what is outside of the photo is left out.
      views: how to cut.
      batch_size: b.
      on_image_error: 'fatal' or 'skip', as in training.
      num_threads: 0: twice as many as there are cores, at most 64.

    Raises:
      UserError: a photo that cannot be read (unless 'skip').
    """
    sizes = [view.crop.middle for view in views]
    canvases = [np.array(view.canvases) for view in views]
    image_index, boxes = np.asarray(image_index, np.int64), np.asarray(boxes, np.float32)
    errors = PhotoErrors(on_image_error)
    starts = np.flatnonzero(np.diff(image_index, prepend=-1))
    photos = map_ordered(
        lambda span: _cut_photo(dataset, image_index, boxes, *span, sizes, canvases, errors),
        itertools.pairwise([*starts.tolist(), len(image_index)]),
        threads=num_threads,
    )
    waiting: dict[tuple[int, ...], list[_Box]] = {}
    for box in itertools.chain.from_iterable(photos):
        group = waiting.setdefault(box.canvases, [])
        group.append(box)
        if len(group) == batch_size:
            del waiting[box.canvases]
            yield from _block_batches(box.canvases, group, canvases, batch_size)
    for key, group in sorted(waiting.items()):
        yield from _block_batches(key, group, canvases, batch_size)


@dataclasses.dataclass(frozen=True)
class _Box:
    """A box of a photo: its canvas and its crop in each view.

    A crop is None where the photo cannot be read or the box has no area in it.
    """

    row: int
    image_index: int
    window: np.ndarray
    photo_size: tuple[int, int]
    canvases: tuple[int, ...]
    crops: Sequence[Crop | None]


def _cut_photo(
    dataset: Dataset,
    image_index: Int64[np.ndarray, " n"],
    boxes: Float32[np.ndarray, "n 4"],
    first: int,
    last: int,
    sizes: Sequence[CropSize],
    canvases: Sequence[Int64[np.ndarray, "c 2"]],
    errors: PhotoErrors,
) -> list[_Box]:
    """Decodes the photo of boxes first ... last - 1 and cuts each of them in every view."""
    index = int(image_index[first])
    errors.count()
    try:
        photo = open_photo(dataset, index)
        windows, chosen, cuts = _plan_cuts(photo.size, boxes[first:last], sizes, canvases)
        crops = _cut(photo, cuts)
        size = photo.size
    except images.ImageError as error:
        errors.skip(dataset.image_file(index), error)
        size = tuple(dataset.image_sizes[index].tolist())
        windows = np.zeros((last - first, 4), np.float32)
        chosen = np.zeros((len(sizes), last - first), np.int64)
        crops = [[None] * (last - first) for _ in sizes]
    return [
        _Box(
            first + row,
            index,
            windows[row],
            size,
            tuple(chosen[:, row].tolist()),
            [view[row] for view in crops],
        )
        for row in range(last - first)
    ]


def _plan_cuts(
    photo_size: tuple[int, int],
    boxes: Float32[np.ndarray, "n 4"],
    sizes: Sequence[CropSize],
    canvases: Sequence[Int64[np.ndarray, "c 2"]],
) -> tuple[Float32[np.ndarray, "n 4"], Int64[np.ndarray, "v n"], list[list[Cut | None]]]:
    """Windows of the boxes of a photo, number of the canvas and `Cut` in each of v views.

    A box without area in the photo has a window of zeros and None for a cut.
    """
    windows = clip_boxes(boxes, np.broadcast_to(photo_size, (len(boxes), 2)))
    real = np.all(windows[:, 2:] > windows[:, :2], axis=1)
    cuts: list[list[Cut | None]] = [[None] * len(boxes) for _ in sizes]
    chosen = np.zeros((len(sizes), len(boxes)), np.int64)
    for view, (size, allowed) in enumerate(zip(sizes, canvases, strict=True)):
        whole = windows_of(windows[real], size)
        chosen[view, real] = choose_canvas(whole.content, allowed)
        fitted = whole.on_canvas(allowed[chosen[view, real]])
        for place, row in enumerate(np.flatnonzero(real)):
            cuts[view][row] = fitted.cut(place, photo_size)
    return np.where(real[:, None], windows, 0).astype(np.float32), chosen, cuts


def _cut(photo: images.Photo, cuts: list[list[Cut | None]]) -> list[list[Crop | None]]:
    """The crops of each view, from one decoding of the photo; None stays None."""
    real = [cut for view in cuts for cut in view if cut is not None]
    if not real:
        return [[None for _ in view] for view in cuts]
    full = np.max([cut.photo_size for cut in real], axis=0)
    areas = np.array([cut.area for cut in real])
    area = (*areas[:, :2].min(axis=0).tolist(), *areas[:, 2:].max(axis=0).tolist())
    pixels = images.decode(photo, tuple(full.tolist()), area)
    return [[None if cut is None else cut.image(pixels) for cut in view] for view in cuts]


def _block_batches(
    key: tuple[int, ...],
    group: list[_Box],
    canvases: Sequence[Int64[np.ndarray, "c 2"]],
    batch_size: int,
) -> Iterator[BoxBatch]:
    rows, image_index = np.full((2, batch_size), -1, np.int64)
    window = np.zeros((batch_size, 4), np.float32)
    photo_size = np.zeros((batch_size, 2), np.int32)
    for slot, box in enumerate(group):
        rows[slot], image_index[slot] = box.row, box.image_index
        window[slot], photo_size[slot] = box.window, box.photo_size
    padding = [None] * (batch_size - len(group))
    for view, number in enumerate(key):
        crops = [box.crops[view] for box in group] + padding
        image, image_size = on_canvas(crops, tuple(canvases[view][number].tolist()))
        yield BoxBatch(
            view, rows, image_index, image, image_size, image_size[:, 0] > 0, window, photo_size
        )
