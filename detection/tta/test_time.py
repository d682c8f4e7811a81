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

Each process works on photos of its own with its own devices, so processes never wait for each
other. There are 2 * len(long_ratios) compiled programs a scale. Where the canvas is larger than
`config.data.canvas`, fewer photos go through at a time, so that memory does not grow with it.

'mean' asks two methods of the model, both pure inference on a batch of images:

  propose_on(batch) -> {'boxes': (B,P,4) canvas pixels, 'scores': (B,P), 'valid': (B,P)}
  score_proposals(batch, boxes (B,P,4) canvas pixels, valid (B,P)) ->
      {'scores': (B,P,K+1) probabilities, background first,
       'boxes': (B,P,K,4) canvas pixels, or (B,P,1,4) where all classes share a box}
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
from common.data.views import ViewBatch, format_canvases, view_batches
from common.io.parallel import behind
from common.io.paths import PathLike
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.training import distributed
from detection.batch_fields import INFERENCE_FIELDS
from detection.inference import add_rows, predict_split, table_metadata
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta import view_steps
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
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    local_mesh = distributed.make_mesh(own)
    if len(own) < mesh.size:
        variables = distributed.to_local(variables, local_mesh)
    canvases = [format_canvases(scale, views.long_ratios, views.max_long) for scale in views.scales]
    per_device = -(-settings.evaluation.batch_size // mesh.size)
    room = per_device * np.prod(settings.data.canvas)
    rows = [
        batch_rows(per_device, len(own), int(room // np.prod(formats[-1]))) for formats in canvases
    ]
    indices = dataset.split(split)
    share = indices[jax.process_index() :: jax.process_count()]
    errors = PhotoErrors(settings.data.on_image_error)
    labels = np.array(dataset.class_labels)
    engine = _Engine(model, variables, local_mesh, views, rows)

    progress = Progress(
        len(share), jax.process_count(), mesh.size, what=f"detect {split}", unit="photos", say=say
    )
    names = ", ".join(map(views.view_name, views.views))
    say(f"detect {split}: {len(indices)} photos, {len(views.views)} views: {names}", flush=True)

    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writer)
            for writer in _writers(output, table_metadata(settings, dataset, split, step), views)
        ]
        batches = view_batches(
            dataset,
            share,
            canvases,
            views.long_ratios,
            rows,
            errors,
            pad_multiple=settings.data.pad_multiple,
            num_threads=settings.data.num_threads,
        )
        done = content = area = 0

        def started() -> Iterator[tuple[np.ndarray, np.ndarray, Callable]]:
            """Rows of the dataset, which of them could be read, and detections of each block."""
            nonlocal content, area
            readable = None
            for batch in progress.timed(batches):
                readable = batch.image_index >= 0 if readable is None else readable
                readable[batch.rows] &= batch.image_valid
                content += batch.image_size.prod(axis=1).sum()
                area += batch.image[..., 0].size
                engine.add(batch)
                if batch.last:
                    yield batch.image_index, readable, engine.finish()
                    readable = None

        # The host writes a block while the devices work on the next.
        for image_index, readable, fetch in behind(started()):
            for writer, detections in zip(writers, fetch(), strict=True):
                add_rows(writer, detections, image_index, readable, dataset, labels)
            done += int((image_index >= 0).sum())
            progress.report(done, {"padding %": 100 * (1 - content / max(area, 1))})
        if errors.skipped:
            say(f"detect {split}: {errors.skipped} unreadable photos have no detections")
    distributed.barrier("predict_views")


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


def _writers(
    output: PathLike, metadata: dict[str, Any], settings: ViewSettings
) -> list[DetectionsWriter]:
    """The writer of the table, or those of the views."""
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    if settings.merge != "tables":
        return [DetectionsWriter(output, metadata, **hosts)]
    names = [settings.view_name(view) for view in settings.views]
    return [
        DetectionsWriter(epath.Path(output) / f"{name}.parquet", metadata | {"view": name}, **hosts)
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
        look = view_steps.view_step(self._model, self._mesh, method)
        for (scale, flip), chunks in self._results.items():
            if scale == batch.scale:
                chunks.append(look(self._variables, on_device, flip))
        if self._mean:
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
