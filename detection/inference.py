"""Runs a detector over a split and writes the detections table, masks too with a mask head.

Shape legend: b images of this host's part of a batch, D detections per image, K classes, S S map of
a mask head, n rows of an image.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int, Shaped

from common.data.dataset import Dataset
from common.data.input import eval_batches
from common.data.labels import VerifiedLabels
from common.data.sources import single_source
from common.geometry import boxes as box_ops
from common.io.parallel import map_ordered
from common.io.paths import PathLike
from common.io.progress import Progress
from common.masks.paste import PASTING_THREADS, box_masks
from common.tables import DetectionsWriter
from common.tables.table import remove_table
from common.training import distributed
from common.training.compiling import announced
from common.training.preemption import stoppable
from common.training.step import make_predict_step
from detection.batch_fields import INFERENCE_FIELDS
from detection.models.faster_rcnn import FasterRCNN
from detection.settings import RunSettings

Started = TypeVar("Started")
Finished = TypeVar("Finished")


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
    mined: bool = False,
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
      mined: instead the boxes that a weak head mines for the classes that are known to be there.
      say: where progress lines go.
    """
    verified, has_masks = None, settings.model.has_masks and not mined
    if mined:
        verified = VerifiedLabels(dataset), single_source(dataset, dataset.split(split))
    batch_size = -(-settings.evaluation.batch_size // mesh.size) * mesh.size
    predict = announced(compiled_predict_step(model, mesh), "detector", say)
    labels = np.array(dataset.class_labels)
    metadata = table_metadata(settings, dataset, split, step)
    writer = DetectionsWriter(
        output,
        metadata,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        masks=has_masks,
    )

    def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        fields = {name: batch[name] for name in INFERENCE_FIELDS}
        if verified is not None:
            labels, source = verified
            nothing = np.zeros(dataset.num_classes, np.int8)
            rows = [labels.of_image(source, i) if i >= 0 else nothing for i in batch["image_index"]]
            fields["labels"] = np.stack(rows)
        return fields

    def finish(started: tuple[dict[str, np.ndarray], dict[str, jax.Array]]) -> list[PhotoRows]:
        batch, results = started
        return photo_rows(
            fetch_detections(results, batch["image_size"]),
            batch["image_index"],
            batch["image_valid"],
            batch["original_size"],
            settings.evaluation.mask_threshold,
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
        what = f"{'mine' if mined else 'detect'} {split}"
        progress = Progress(batches.num_batches, batch_size, mesh.size, what=what, say=say)
        started = (
            (batch, predict(variables, distributed.to_global(read(batch), mesh)))
            for batch in progress.timed(batches)
        )
        finished = finish_behind(finish, started, masks=has_masks)
        for number, photos in enumerate(stoppable(finished), start=1):
            add_rows(writer, photos, dataset, labels)
            progress.report(number)
        if batches.skipped_images:
            say(f"{what}: {batches.skipped_images} unreadable photos have no detections")
    distributed.barrier("predict_split")


def fetch_detections(
    results: Mapping[str, jax.Array], image_size: Float32[np.ndarray, "b 2"]
) -> dict[str, np.ndarray]:
    """Waits for the detections of a batch; their boxes become normalised.

    Args:
      results: of the inference step, boxes in canvas pixels.
      image_size: height and width of the content on the canvas.
    """
    detections = distributed.to_host(results)
    return detections | {"boxes": detections["boxes"] / box_ops.per_side(image_size)[:, None]}


def clear_table(table: PathLike) -> None:
    """Makes room for a table where another number of processes left one; all processes call it.

    One process writes a file, several a folder of shards.
    """
    if distributed.is_main_process():
        remove_table(table)
    distributed.barrier("clear_table")


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
        "classes": list(dataset.class_labels),  # of the model: the dataset is seen as it sees it
        "expanded": False,
    }


def finish_behind(
    finish: Callable[[Started], Finished], started: Iterable[Started], *, masks: bool
) -> Iterator[Finished]:
    """Yields finish(item) in order while the devices work on the next items.

    `finish` waits for the devices; the pasting of masks keeps several threads busy.
    """
    threads = PASTING_THREADS if masks else 1
    return map_ordered(finish, started, threads=threads, ahead=threads)


class PhotoRows(NamedTuple):
    """Rows of a photo, as the table has them.

    Attributes:
      image: row of the dataset.
      classes: class indices.
      boxes: normalised.
      masks: counts of each; None without mask head.
      size: height and width of the photo and the masks.
    """

    image: int
    classes: Int[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    masks: list[bytes] | None
    size: tuple[int, int]


def photo_rows(
    detections: Mapping[str, np.ndarray],
    image_index: Int[np.ndarray, " b"],
    image_valid: Bool[np.ndarray, " b"],
    photo_sizes: Int[np.ndarray, "b 2"],
    mask_threshold: float,
) -> list[PhotoRows]:
    """The rows of each real image of a batch.

    Args:
      detections: boxes (b, D, 4) normalised, scores, classes, valid (b, D), and with a mask head
        masks (b, D, S, S). Boxes are clipped to the image; what has no area then is left out.
      image_index: rows of the dataset.
      image_valid: which images are real.
      photo_sizes: height and width of the photos.
      mask_threshold: probability that a pixel of a mask must exceed.
    """
    boxes = np.clip(detections["boxes"], 0.0, 1.0)
    photos = []
    for slot in np.flatnonzero(image_valid):
        sides = boxes[slot, :, 2:] > boxes[slot, :, :2]
        rows = detections["valid"][slot] & sides.all(axis=-1)
        size = (int(photo_sizes[slot, 0]), int(photo_sizes[slot, 1]))
        masks = None
        if "masks" in detections:
            pixels = boxes[slot][rows] * box_ops.per_side(photo_sizes[slot])
            masks = box_masks(detections["masks"][slot][rows], pixels, size, mask_threshold)
        photos.append(
            PhotoRows(
                image=int(image_index[slot]),
                classes=detections["classes"][slot][rows],
                scores=detections["scores"][slot][rows],
                boxes=boxes[slot][rows],
                masks=masks,
                size=size,
            )
        )
    return photos


def add_rows(
    writer: DetectionsWriter,
    photos: Iterable[PhotoRows],
    dataset: Dataset,
    labels: Shaped[np.ndarray, " K"],
) -> None:
    """Adds photos to a table.

    Args:
      writer: of the table.
      photos: with or without rows.
      dataset: where the ids are.
      labels: of the classes.
    """
    for photo in photos:
        writer.add(
            dataset.image_id(photo.image),
            labels[photo.classes],
            photo.scores,
            photo.boxes,
            photo.masks,
            None if photo.masks is None else np.tile(photo.size, (len(photo.masks), 1)),
        )
