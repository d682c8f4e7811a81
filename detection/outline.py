"""Gives the boxes of a detections table masks: the same rows, outlined by a mask head.

So the boxes of an ensemble, or of detectors that have no masks, are outlined by one model. Each
process works on images of its own with its own devices. A slot of a batch is a photo with P of its
boxes; a photo with more is looked at several times. With `config.test_time.scales` the maps of all
views are averaged.

Shape legend
  b  slots of a batch
  P  padded boxes of a slot
  n  rows of a part of the table
  S  side of a map
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float32, Int32, Int64

from common.data.dataset import Dataset
from common.data.input import proposal_batches
from common.data.photo_errors import PhotoErrors
from common.data.proposals import TableBoxes
from common.data.views import DatasetPhotos
from common.geometry import boxes as box_ops
from common.io.errors import UserError
from common.io.paths import PathLike
from common.io.progress import Progress
from common.masks import rle
from common.masks.paste import box_masks
from common.tables import DetectionsReader, DetectionsWriter
from common.tables.masked import RowMasks, write_with_masks
from common.tables.table import Detections
from common.training import distributed
from common.training.compiling import announced
from common.training.distributed import DATA_AXIS
from common.training.preemption import stoppable
from detection.batch_fields import INFERENCE_FIELDS, REFINER_FIELDS
from detection.inference import finish_behind
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta import view_steps
from detection.tta.photo_blocks import BlockPhotos, make_layout, open_views


@functools.cache
def outline_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """Jitted `(variables, batch) -> maps (b,P,S,S)` of its proposals, taken as of its `classes`."""

    def outline(variables, batch):
        boxes, classes, valid = (batch[k] for k in ("proposals", "classes", "proposal_valid"))
        return model.apply(variables, batch, boxes, classes, valid, method="predict_masks")

    return jax.jit(
        jax.shard_map(
            outline,
            mesh=mesh,
            in_specs=(P(), P(DATA_AXIS)),
            out_specs=P(DATA_AXIS),
            check_vma=False,
        )
    )


def outline_table(
    settings: RunSettings,
    model: FasterRCNN,
    variables: dict,
    dataset: Dataset,
    table: PathLike,
    mesh: Mesh,
    output: PathLike,
    *,
    step: int,
    say: Callable = print,
) -> None:
    """Writes a table again with masks (a folder of shards with many hosts).

    Rows, their order, labels, scores, boxes and metadata stay; the metadata get `outline`. Masks
    that the table had are replaced.

    Args:
      settings: of the run; `data.max_proposals`, or else `model.detections.max_detections`, boxes
        of a photo go through the model at a time.
      model: detector with a mask head.
      variables: {'params', 'batch_stats'} on the mesh.
      dataset: with the table's images.
      table: detections table, file or folder.
      mesh: all devices.
      output: Parquet file, or folder when there are several processes.
      step: of the checkpoint.
      say: where progress lines go.

    Raises:
      UserError: a broken table, one of images that the dataset has not, or of labels that are not
        the model's, unless all classes share a mask.
    """
    process, processes = jax.process_index(), jax.process_count()
    variables, local_mesh = distributed.own_part(variables, mesh)
    reader = DetectionsReader(table)
    if not reader.num_rows:
        raise UserError(f"{table}: found a table without rows, expected boxes to outline")
    count = len(reader.image_ids)
    places = range(process * count // processes, (process + 1) * count // processes)
    boxes = TableBoxes(reader, dataset, places)
    labels = None if settings.model.mask_head.kind == "class_agnostic" else dataset.class_labels
    engine = _Outliner(settings, model, variables, dataset, boxes, local_mesh, say)
    metadata = {
        "model": settings.name,
        "config": settings.to_dict(),
        "step": step,
        "dataset": dataset.meta.get("name", str(dataset.directory)),
    }
    say(f"outline {table}: {count} images, {reader.num_rows} boxes", flush=True)
    with DetectionsWriter(
        output,
        dict(reader.metadata) | {"outline": metadata},
        process_index=process,
        process_count=processes,
        masks=True,
    ) as writer:
        write_with_masks(reader, writer, places, labels, engine.outline)
    if engine.skipped:
        say(f"outline {table}: {engine.skipped} unreadable photos have empty masks")
    distributed.barrier("outline_table")


class _Outliner:
    """Makes the masks of parts of a table, in one view or, with `config.test_time`, in several."""

    def __init__(
        self,
        settings: RunSettings,
        model: FasterRCNN,
        variables: dict,
        dataset: Dataset,
        boxes: TableBoxes,
        mesh: Mesh,
        say: Callable,
    ):
        count = settings.data.max_proposals or settings.model.detections.max_detections
        self._data = dataclasses.replace(settings.data, max_proposals=count, sources=())
        self._settings, self._model, self._variables = settings, model, variables
        self._dataset, self._boxes, self._mesh = dataset, boxes, mesh
        self._errors, self._say = PhotoErrors(settings.data.on_image_error), say
        self._skipped = self._done = 0
        total = int(boxes.counts.sum())
        self._progress = Progress(total, what="outline", unit="boxes", say=say)

    @property
    def skipped(self) -> int:
        """Photos so far that cannot be read, each as often as it came."""
        return self._skipped + self._errors.skipped

    def outline(self, part: Detections) -> Iterator[RowMasks]:
        """The masks of the rows of a part, in an order that suits the canvases."""
        places = range(int(part.image_index[0]), int(part.image_index[-1]) + 1)
        pieces = Pieces(part, *self._boxes.pieces(places, self._data.max_proposals))
        if self._settings.test_time.is_on:
            started = self._start_views(pieces)
        else:
            started = self._start(pieces, places)
        threshold = self._settings.evaluation.mask_threshold
        finish = functools.partial(paste_maps, part, threshold=threshold)
        seen = np.zeros(len(part), bool)
        pasted = finish_behind(finish, started, masks=True)
        for masks in stoppable(pasted, together=False):
            yield masks
            seen[masks.rows] = True
            self._done += len(masks.rows)
            self._progress.report(self._done)
        yield from self._empty(part, np.flatnonzero(~seen))

    def _start(self, pieces: "Pieces", places: range) -> Iterator["Started"]:
        batch_size = -(-self._settings.evaluation.batch_size // jax.device_count())
        batches, members = proposal_batches(
            self._dataset, self._boxes, places, self._data, batch_size=batch_size * self._mesh.size
        )
        run = announced(outline_step(self._model, self._mesh), "mask head", self._say)
        for number, batch in enumerate(self._progress.timed(batches)):
            rows, _, classes, _ = pieces.of(members[number], self._data.max_proposals)
            fields = {name: batch[name] for name in REFINER_FIELDS} | {"classes": classes}
            maps = run(self._variables, distributed.to_global(fields, self._mesh))
            yield Started(rows, batch["proposal_valid"], batch["original_size"], maps)
        self._skipped += batches.skipped_images

    def _start_views(self, pieces: "Pieces") -> Iterator["Started"]:
        views, mesh = self._settings.test_time.views, self._mesh
        layout = make_layout(self._settings, jax.device_count(), mesh.size)
        photos_of = DatasetPhotos(self._dataset)
        batches = open_views(self._settings, photos_of, pieces.images, layout, self._errors)
        on_devices: list[list] = [[] for _ in layout.canvases]
        photos = None
        for batch in self._progress.timed(batches):
            photos = BlockPhotos.of(batch) if photos is None else photos
            photos.add(batch)
            fields = {name: getattr(batch, name) for name in INFERENCE_FIELDS}
            on_devices[batch.scale].append(distributed.to_global(fields, mesh))
            if batch.last:
                rows, boxes, classes, real = pieces.of(photos.place, self._data.max_proposals)
                sides = (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)
                valid = real & photos.readable[:, None] & sides
                given = distributed.to_global(dict(boxes=boxes, classes=classes, valid=valid), mesh)
                what = (self._variables, on_devices, given, views, self._say)
                maps = view_steps.mean_masks(self._model, mesh, *what)
                yield Started(rows, valid, photos.size, maps)
                on_devices, photos = [[] for _ in layout.canvases], None

    def _empty(self, part: Detections, rows: Int64[np.ndarray, " n"]) -> Iterator[RowMasks]:
        """Empty masks for the rows of photos that could not be opened."""
        if len(rows):
            places = part.image_index[rows]
            sizes = np.maximum(self._dataset.image_sizes[self._boxes.images[places]], 1)
            yield RowMasks(rows, [_empty_mask(size) for size in sizes], sizes)


class Pieces(NamedTuple):
    """Boxes of a part of a table, cut so that each piece is of one image.

    Attributes:
      part: rows of the table, in the order of the pieces.
      images: (s,) row of the dataset of each piece.
      first: (s,) its first box within the image.
      counts: (s,) number of its boxes.
    """

    part: Detections
    images: Int64[np.ndarray, " s"]
    first: Int64[np.ndarray, " s"]
    counts: Int64[np.ndarray, " s"]

    def of(
        self, members: Int64[np.ndarray, " b"], size: int
    ) -> tuple[
        list[Int64[np.ndarray, " n"]],
        Float32[np.ndarray, "b P"],
        Int32[np.ndarray, "b P"],
        Bool[np.ndarray, "b P"],
    ]:
        """Rows of the pieces `members` (-1: none), their boxes and classes, and which are real."""
        start = np.cumsum(self.counts) - self.counts
        count = len(members)
        boxes = np.zeros((count, size, 4), np.float32)
        classes, real = np.zeros((count, size), np.int32), np.zeros((count, size), bool)
        rows = []
        for slot, member in enumerate(members.tolist()):
            own = start[member] + np.arange(self.counts[member] if member >= 0 else 0)
            boxes[slot, : len(own)] = np.clip(self.part.boxes[own], 0.0, 1.0)
            classes[slot, : len(own)] = self.part.label_index[own]
            real[slot, : len(own)] = True
            rows.append(own)
        return rows, boxes, classes, real


class Started(NamedTuple):
    """Boxes that the devices work on.

    Attributes:
      rows: of the part, those of each slot.
      valid: (b, P) boxes that are outlined.
      size: (b, 2) height and width of the photos.
      maps: (b, P, S, S).
    """

    rows: list[Int64[np.ndarray, " n"]]
    valid: Bool[np.ndarray, "b P"]
    size: Int32[np.ndarray, "b 2"]
    maps: jax.Array


def paste_maps(part: Detections, started: Started, threshold: float) -> RowMasks:
    """Masks of the rows; those of unreadable photos and of boxes without area are empty."""
    maps = distributed.to_host(started.maps)
    counts: list[bytes] = []
    sizes = []
    for slot, rows in enumerate(started.rows):
        size = np.maximum(started.size[slot], 1)  # unreadable photos may have none
        boxes = np.clip(part.boxes[rows], 0.0, 1.0) * box_ops.per_side(size)
        valid = started.valid[slot, : len(rows)]
        valid = valid & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        shape = (int(size[0]), int(size[1]))
        found = iter(box_masks(maps[slot, : len(rows)][valid], boxes[valid], shape, threshold))
        counts += [next(found) if real else _empty_mask(size) for real in valid]
        sizes.append(np.tile(size, (len(rows), 1)))
    return RowMasks(np.concatenate(started.rows), counts, np.concatenate(sizes))


def _empty_mask(size: Int32[np.ndarray, " 2"]) -> bytes:
    return rle.encode_window(np.zeros((1, 1), bool), 0, 0, (int(size[0]), int(size[1])))
