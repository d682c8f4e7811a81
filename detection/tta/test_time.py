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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from common.data.dataset import Dataset
from common.data.photo_errors import PhotoErrors
from common.data.views import DatasetPhotos, ViewBatch
from common.io.paths import PathLike
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.training import distributed
from common.training.preemption import stoppable
from detection.inference import add_rows, predict_split, table_metadata
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings
from detection.tta.engine import detect_blocks, make_engine
from detection.tta.photo_blocks import make_layout, open_views
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
    engine = make_engine(settings, model, variables, local_mesh, layout, say)

    progress = Progress(
        len(share), jax.process_count(), mesh.size, what=f"detect {split}", unit="photos", say=say
    )
    names = ", ".join(map(views.view_name, views.views))
    say(f"detect {split}: {len(indices)} photos, {len(views.views)} views: {names}", flush=True)
    done = content = area = 0

    def counted(batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
        nonlocal content, area
        for batch in batches:
            content += batch.image_size.prod(axis=1).sum()
            area += batch.image[..., 0].size
            yield batch

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
        batches = open_views(settings, DatasetPhotos(dataset), share, layout, errors)
        blocks = detect_blocks(settings, engine, counted(progress.timed(batches)))
        for photos, tables in stoppable(blocks, together=False):
            for writer, rows in zip(writers, tables, strict=True):
                add_rows(writer, rows, dataset, labels)
            done += int((photos.index >= 0).sum())
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
