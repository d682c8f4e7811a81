"""Runs a detector over a split and writes the detections table.

Shape legend: b images of this host's part of a batch, D detections per image, K classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, Shaped

from common.data.dataset import Dataset
from common.data.input import eval_batches
from common.geometry import boxes as box_ops
from common.io.parallel import behind
from common.io.paths import PathLike
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.training import distributed
from common.training.step import make_predict_step
from detection.batch_fields import INFERENCE_FIELDS
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings


@functools.cache
def compiled_predict_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """The jitted inference step; one object a model, so that evaluations share a compile."""
    return jax.jit(make_predict_step(model, mesh))


def predict_split(
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
    """Detects in every image of a split and writes one table (a folder of shards with many hosts).

    Args:
      settings: of the run.
      model: detector.
      variables: {'params', 'batch_stats'} on the mesh.
      dataset: where the photos are listed.
      split: which of them.
      mesh: all devices.
      output: Parquet file, or folder when there are several processes.
      step: of the checkpoint, for the table's metadata.
      say: where progress lines go.
    """
    batch_size = -(-settings.evaluation.batch_size // mesh.size) * mesh.size
    predict = compiled_predict_step(model, mesh)
    labels = np.array(dataset.class_labels)
    metadata = table_metadata(settings, dataset, split, step)
    writer = DetectionsWriter(
        output, metadata, process_index=jax.process_index(), process_count=jax.process_count()
    )
    with writer:
        batches = eval_batches(
            dataset,
            split,
            settings.data,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        what = f"detect {split}"
        progress = Progress(batches.num_batches, batch_size, mesh.size, what=what, say=say)
        started = (
            (batch, predict(variables, distributed.to_global(batch, mesh, INFERENCE_FIELDS)))
            for batch in progress.timed(batches)
        )
        # The host writes batch i while the devices work on batch i + 1.
        for number, (batch, results) in enumerate(behind(started), start=1):
            detections = distributed.to_host(results)
            units = box_ops.per_side(batch["image_size"])
            detections["boxes"] = detections["boxes"] / units[:, None]
            images = batch["image_index"], batch["image_valid"]
            add_rows(writer, detections, *images, dataset, labels)
            progress.report(number)
        if batches.skipped_images:
            say(f"detect {split}: {batches.skipped_images} unreadable photos have no detections")
    distributed.barrier("predict_split")


def table_metadata(
    settings: RunSettings, dataset: Dataset, split: str, step: int
) -> dict[str, Any]:
    """What a detections table says of its origin."""
    return {
        "model": settings.name,
        "config": settings.to_dict(),
        "dataset": dataset.meta.get("name", str(dataset.directory)),
        "split": split,
        "step": step,
        "expanded": False,
    }


def add_rows(
    writer: DetectionsWriter,
    detections: dict[str, np.ndarray],
    image_index: Int[np.ndarray, " b"],
    image_valid: Bool[np.ndarray, " b"],
    dataset: Dataset,
    labels: Shaped[np.ndarray, " K"],
) -> None:
    """Adds the detections of each real image.

    Args:
      writer: of the table.
      detections: boxes (b, D, 4) normalised, scores, classes, valid (b, D). Boxes are clipped to
        the image; what has no area then is left out.
      image_index: rows of the dataset.
      image_valid: images to add.
      dataset: where the ids are.
      labels: of the classes.
    """
    boxes = np.clip(detections["boxes"], 0.0, 1.0)
    for slot in np.flatnonzero(image_valid):
        sides = boxes[slot, :, 2:] > boxes[slot, :, :2]
        rows = detections["valid"][slot] & sides.all(axis=-1)
        writer.add(
            dataset.image_id(image_index[slot]),
            labels[detections["classes"][slot][rows]],
            detections["scores"][slot][rows],
            boxes[slot][rows],
        )
