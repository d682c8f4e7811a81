"""Sends blocks of photos through the compiled steps, in one view or in several.

Shape legend: B photos of a block, D detections of each, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool

from common.data.views import ViewBatch
from common.training import distributed
from common.training.compiling import announced
from detection.batch_fields import INFERENCE_FIELDS
from detection.inference import (
    PhotoRows,
    compiled_predict_step,
    fetch_detections,
    finish_behind,
    photo_rows,
)
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta import view_steps
from detection.tta.photo_blocks import BlockPhotos, Layout
from detection.tta.settings import ViewSettings

BatchDetections = dict[str, np.ndarray]
Keep = Callable[[BatchDetections], Bool[np.ndarray, "B D"]]


class Engine(Protocol):
    """Runs the compiled steps of a block: `add` each batch, then `finish`."""

    def add(self, batch: ViewBatch) -> None:
        """Sends a batch to the devices; does not wait for them."""

    def finish(self) -> Callable[[], list[BatchDetections]]:
        """Ends a block; the function returned fetches the detections of each table."""


class BlockRows(NamedTuple):
    """What was found in a block.

    Attributes:
      photos: of the block.
      tables: of each table the rows of each readable photo.
    """

    photos: BlockPhotos
    tables: list[list[PhotoRows]]


def make_engine(
    settings: RunSettings,
    model: FasterRCNN,
    variables: dict,
    mesh: Mesh,
    layout: Layout,
    say: Callable,
) -> Engine:
    """What runs the blocks of a layout, in the views of `config.test_time` if there are any."""
    if settings.test_time.is_on:
        return SeveralViews(model, variables, mesh, settings.test_time, layout.rows, say)
    return OneView(model, variables, mesh, say)


def detect_blocks(
    settings: RunSettings, engine: Engine, batches: Iterable[ViewBatch], keep: Keep | None = None
) -> Iterator[BlockRows]:
    """Yields what is found in each block, while the devices work on the next.

    Args:
      settings: of the run.
      engine: runs the blocks.
      batches: of all blocks, one after the other.
      keep: which detections of a table are wanted; None: all.
    """

    def started() -> Iterator[tuple[BlockPhotos, Callable[[], list[BatchDetections]]]]:
        photos = None
        for batch in batches:
            photos = BlockPhotos.of(batch) if photos is None else photos
            photos.add(batch)
            engine.add(batch)
            if batch.last:
                yield photos, engine.finish()
                photos = None

    def finish(block: tuple[BlockPhotos, Callable[[], list[BatchDetections]]]) -> BlockRows:
        photos, fetch = block
        tables = []
        for detections in fetch():
            if keep is not None:
                detections = detections | {"valid": detections["valid"] & keep(detections)}
            what = detections, photos.index, photos.readable, photos.size
            tables.append(photo_rows(*what, settings.evaluation.mask_threshold))
        return BlockRows(photos, tables)

    return finish_behind(finish, started(), masks=settings.model.has_masks)


class OneView:
    """An `Engine` whose blocks are one batch each."""

    def __init__(self, model: FasterRCNN, variables: dict, mesh: Mesh, say: Callable):
        self._predict = announced(compiled_predict_step(model, mesh), "detector", say)
        self._variables, self._mesh = variables, mesh
        self._fetch: Callable[[], list[BatchDetections]] = list

    def add(self, batch: ViewBatch) -> None:
        fields = {name: getattr(batch, name) for name in INFERENCE_FIELDS}
        results = self._predict(self._variables, distributed.to_global(fields, self._mesh))
        self._fetch = lambda: [fetch_detections(results, batch.image_size)]

    def finish(self) -> Callable[[], list[BatchDetections]]:
        return self._fetch


class SeveralViews:
    """An `Engine` that joins the views of `config.test_time`."""

    def __init__(
        self,
        model: FasterRCNN,
        variables: dict,
        mesh: Mesh,
        settings: ViewSettings,
        rows: Sequence[Sequence[np.ndarray]],
        say: Callable,
    ):
        self._say = say
        self._model, self._variables, self._mesh = model, variables, mesh
        self._settings, self._rows = settings, rows
        self._mean = settings.merge == "mean"
        self._own_masks = model.settings.has_masks and settings.merge == "tables"
        self._joint_masks = model.settings.has_masks and settings.merge != "tables"
        self._start()

    def _start(self) -> None:
        self._results: dict[tuple[int, bool], list[dict[str, Array]]] = {
            view: [] for view in self._settings.views
        }
        self._batches: list[list[dict[str, Array]]] = [[] for _ in self._settings.scales]

    def add(self, batch: ViewBatch) -> None:
        """Sends the views of a batch to the devices; does not wait for them."""
        fields = {name: getattr(batch, name) for name in INFERENCE_FIELDS}
        on_device = distributed.to_global(fields, self._mesh)
        method = "propose_on" if self._mean else None
        look = view_steps.view_step(self._model, self._mesh, method, self._own_masks)
        look = announced(look, "detector", self._say)
        for (scale, flip), chunks in self._results.items():
            if scale == batch.scale:
                chunks.append(look(self._variables, on_device, flip))
        if self._mean or self._joint_masks:
            self._batches[batch.scale].append(on_device)

    def finish(self) -> Callable[[], list[BatchDetections]]:
        """Starts merging the views; the function returned fetches the detections of each table."""
        results, batches = self._results, self._batches
        self._start()
        if self._settings.merge == "tables":
            return lambda: [
                _in_order(distributed.to_host(chunks), self._rows[scale])
                for (scale, _), chunks in results.items()
            ]
        views = list(results.values())
        if self._mean:
            merged = self._score_all(views, batches)
        else:
            merged = view_steps.union_step(self._model, self._mesh)(views)
        if self._joint_masks:
            given = (self._variables, batches, merged, self._settings.views, self._say)
            merged |= {"masks": view_steps.mean_masks(self._model, self._mesh, *given)}
        return lambda: [distributed.to_host(merged)]

    def _score_all(self, views, batches) -> dict[str, Array]:
        proposals = view_steps.join_step(self._model, self._mesh)(views)
        score = view_steps.score_step(self._model, self._mesh)
        score = announced(score, "second stage", self._say)
        total = None
        for scale, flip in self._settings.views:
            chunks = [
                score(self._variables, batch, flip, proposals, np.int32(number))
                for number, batch in enumerate(batches[scale])
            ]
            total = view_steps.sum_step(self._mesh)(total, chunks)
        average = view_steps.average_step(self._model, self._mesh)
        return average(total, proposals["valid"], np.float32(len(self._settings.views)))


def _in_order(chunks: Sequence[dict], rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Puts the rows of batches to their places in the block."""
    order = np.argsort(np.concatenate(rows))
    return {name: np.concatenate([c[name] for c in chunks])[order] for name in chunks[0]}
