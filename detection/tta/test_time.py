"""Test-time augmentation: each photo at several scales, and mirrored (paper section 6).

`config.test_time`, used by detection.export and detection.evaluate, never by training:

  scales       short sides in pixels; () is off: one view on `config.data.canvas`
  long_ratios  canvases have these ratios of long to short side, ascending, in landscape and in
               portrait; a photo longer than the last one is shrunk until it fits
  max_long     pixels; no canvas is longer
  flip         whether each scale is seen mirrored too
  merge        'union':  the detections of all views, then NMS by class
               'tables': one detections table a view, for ensemble.merge with any operator
               'mean':   proposals of all views are joined by NMS; each view scores all of them;
                         boxes and class probabilities are averaged (the authors' released code)

With a mask head, the masks of the merged detections are the mean of the maps that every view gives
for their boxes; with 'tables' each view has its own.

Each process works on photos of its own with its own devices, so processes never wait for each
other. There are 2 * len(long_ratios) compiled programs a scale. Where the canvas is larger than
`config.data.canvas`, fewer photos go through at a time, so that memory does not grow with it.

'mean' asks two methods of the model, both pure inference on a batch of images:

  propose_on(batch) -> {'boxes': (B,P,4) canvas pixels, 'scores': (B,P), 'valid': (B,P)}
  score_proposals(batch, boxes (B,P,4) canvas pixels, valid (B,P)) ->
      {'scores': (B,P,K+1) probabilities, background first,
       'boxes': (B,P,K,4) canvas pixels, or (B,P,1,4) where all classes share a box}

and masks one: predict_masks(batch, boxes (B,D,4) canvas pixels, classes (B,D), valid (B,D)) ->
uint16 (B,D,S,S), as `common.masks.probability` counts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from common.data.dataset import Dataset
from common.data.photo_errors import PhotoErrors
from common.data.views import ViewBatch
from common.io.paths import PathLike
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.training import distributed
from common.training.preemption import stoppable
from detection.batch_fields import INFERENCE_FIELDS
from detection.inference import (
    PhotoRows,
    add_rows,
    finish_behind,
    photo_rows,
    predict_split,
    table_metadata,
)
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta import view_steps
from detection.tta.blocks import BlockPhotos, make_layout, open_views
from detection.tta.settings import ViewSettings


def detect_split(
    settings: RunSettings,
    model: FasterRCNN,
    variables: dict,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    output: PathLike,
    *,
    step: int,
    say: Callable = print,
) -> None:
    """Detects in every image of a split, in the way that `config.test_time` says.

    Args and output as `detection.inference.predict_split`; with merge 'tables', `output` is a
    folder of tables `scale0800.parquet`, `scale0800_flip.parquet` and so on.
    """
    detect = predict_views if settings.test_time.is_on else predict_split
    detect(settings, model, variables, dataset, split, mesh, output, step=step, say=say)


def predict_views(
    settings: RunSettings,
    model: FasterRCNN,
    variables: dict,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    output: PathLike,
    *,
    step: int,
    say: Callable = print,
) -> None:
    """`detect_split` with several views."""
    views = settings.test_time
    variables, local_mesh = distributed.own_part(variables, mesh)
    layout = make_layout(settings, mesh.size, local_mesh.size)
    indices = dataset.split(split)
    share = indices[jax.process_index() :: jax.process_count()]
    errors = PhotoErrors(settings.data.on_image_error)
    labels = np.array(dataset.class_labels)
    engine = _Engine(model, variables, local_mesh, views, layout.rows)

    progress = Progress(
        len(share), jax.process_count(), mesh.size, what=f"detect {split}", unit="photos", say=say
    )
    names = ", ".join(map(views.view_name, views.views))
    say(f"detect {split}: {len(indices)} photos, {len(views.views)} views: {names}", flush=True)

    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writer)
            for writer in _writers(
                output,
                table_metadata(settings, dataset, split, step),
                views,
                settings.model.has_masks,
            )
        ]
        batches = open_views(settings, dataset, share, layout, errors)
        done = content = area = 0

        def started() -> Iterator[tuple[BlockPhotos, Callable]]:
            """The photos of each block, and what fetches their detections."""
            nonlocal content, area
            photos = None
            for batch in progress.timed(batches):
                photos = BlockPhotos.of(batch) if photos is None else photos
                photos.add(batch)
                content += batch.image_size.prod(axis=1).sum()
                area += batch.image[..., 0].size
                engine.add(batch)
                if batch.last:
                    yield photos, engine.finish()
                    photos = None

        def finish(block: tuple[BlockPhotos, Callable]) -> tuple[int, list[list[PhotoRows]]]:
            """Number of photos of a block, and the rows of each table."""
            photos, fetch = block
            what = photos.index, photos.readable, photos.size
            threshold = settings.evaluation.mask_threshold
            tables = [photo_rows(detections, *what, threshold) for detections in fetch()]
            return int((photos.index >= 0).sum()), tables

        # The host writes a block while the devices work on the next.
        finished = finish_behind(finish, started(), masks=settings.model.has_masks)
        for number, tables in stoppable(finished, together=False):
            for writer, rows in zip(writers, tables, strict=True):
                add_rows(writer, rows, dataset, labels)
            done += number
            progress.report(done, {"padding %": 100 * (1 - content / max(area, 1))})
        if errors.skipped:
            say(f"detect {split}: {errors.skipped} unreadable photos have no detections")
    distributed.barrier("predict_views")


def _writers(
    output: PathLike, metadata: dict[str, Any], settings: ViewSettings, masks: bool
) -> list[DetectionsWriter]:
    """The writer of the table, or those of the views."""
    options: dict[str, Any] = dict(
        process_index=jax.process_index(), process_count=jax.process_count(), masks=masks
    )
    if settings.merge != "tables":
        return [DetectionsWriter(output, metadata, **options)]
    names = [settings.view_name(view) for view in settings.views]
    return [
        DetectionsWriter(
            epath.Path(output) / f"{name}.parquet", metadata | {"view": name}, **options
        )
        for name in names
    ]


class _Engine:
    """Runs the compiled steps of a block: `add` each batch, then `finish`."""

    def __init__(
        self,
        model: FasterRCNN,
        variables: dict,
        mesh: Mesh,
        settings: ViewSettings,
        rows: Sequence[Sequence[np.ndarray]],
    ):
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
        for (scale, flip), chunks in self._results.items():
            if scale == batch.scale:
                chunks.append(look(self._variables, on_device, flip))
        if self._mean or self._joint_masks:
            self._batches[batch.scale].append(on_device)

    def finish(self) -> Callable[[], list[dict[str, np.ndarray]]]:
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
            given = (self._variables, batches, merged, self._settings.views)
            merged |= {"masks": view_steps.mean_masks(self._model, self._mesh, *given)}
        return lambda: [distributed.to_host(merged)]

    def _score_all(self, views, batches) -> dict[str, Array]:
        proposals = view_steps.join_step(self._model, self._mesh)(views)
        score = view_steps.score_step(self._model, self._mesh)
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
