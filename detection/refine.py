"""Refines the boxes of a detections table: the same rows, scores and labels, better boxes.

Each process works on images of its own with its own devices. A slot of a batch is a photo with at
most `config.data.max_proposals` boxes; a photo with more is looked at several times.

Shape legend
  b  slots of a batch
  P  padded boxes of a slot
  n  rows of the table
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32

from common.data.dataset import GROUP_OF, Dataset
from common.data.input import proposal_batches
from common.data.proposals import TableBoxes
from common.geometry import boxes as box_ops
from common.io.errors import UserError
from common.io.parallel import behind
from common.io.paths import PathLike
from common.io.progress import Progress
from common.metrics.coverage import split_images
from common.metrics.openimages import best_overlaps
from common.tables import DetectionsReader, DetectionsWriter
from common.training import distributed
from common.training.compiling import announced
from common.training.preemption import stoppable
from detection.batch_fields import REFINER_FIELDS
from detection.inference import compiled_predict_step
from detection.models.box_refiner import BoxRefiner
from detection.settings import RunSettings

_MATCH_IOU = 0.5  # a box with less has no object to be moved onto
_CHUNK = 4096  # images scored at a time
_ROWS = 1 << 16  # boxes handed on at a time


class Rows(NamedTuple):
    """Normalised boxes of rows of the table, and which of them were refined."""

    boxes: Float32[np.ndarray, "n 4"]
    refined: Bool[np.ndarray, " n"]


def open_proposals(
    settings: RunSettings, dataset: Dataset, say: Callable = print
) -> TableBoxes | None:
    """The table of `config.data.proposals` that a refiner trains on; None for detectors.

    None too for a refiner that trains on jittered ground truth alone.

    Raises:
      UserError: no table given, or none of the training photos, or the table of
        `config.evaluation.proposals` lacks images.
    """
    if not settings.model.refines:
        return None
    data = settings.data
    if settings.evaluation.proposals:  # rather now than after the training
        scored = DetectionsReader(settings.evaluation.proposals)
        split_images(dataset, data.eval_split, scored, allow_partial=False)
    if not data.proposals:
        if settings.model.truth_jitter.copies:
            return None
        raise UserError(
            "config.data.proposals: empty, expected a detections table of the training photos "
            "(or --config.model.truth_jitter.copies=N to train on jittered ground truth)"
        )
    boxes = TableBoxes(DetectionsReader(data.proposals), dataset)
    images = dataset.split(data.train_split)
    covered = boxes.num_covered(images)
    say(
        f"proposals: {data.proposals}, {boxes.counts.sum()} boxes; covers {covered} of "
        f"{len(images)} training images",
        flush=True,
    )
    if not covered:
        raise UserError(
            f"{data.proposals}: covers no image of split {data.train_split!r} of "
            f"{dataset.directory}"
        )
    return boxes


def refine_table(
    settings: RunSettings,
    model: BoxRefiner,
    variables: dict,
    dataset: Dataset,
    table: PathLike,
    mesh: Mesh,
    output: PathLike,
    *,
    step: int,
    say: Callable = print,
) -> None:
    """Writes a table again with refined boxes (a folder of shards with many hosts).

    Rows, their order, labels, scores, masks and metadata stay; the metadata get `refinement`. A row
    whose box has no area, or whose photo cannot be read (data.on_image_error 'skip'), keeps it.

    Args:
      settings: of the run.
      model: refiner.
      variables: {'params', 'batch_stats'} on the mesh.
      dataset: with the table's images; the labels need not be its own.
      table: detections table, file or folder.
      mesh: all devices.
      output: Parquet file, or folder when there are several processes.
      step: of the checkpoint.
      say: where progress lines go.

    Raises:
      UserError: a broken table, or one of images that the dataset has not.
    """
    process, processes = jax.process_index(), jax.process_count()
    variables, local_mesh = distributed.own_part(variables, mesh)
    batch_size = -(-settings.evaluation.batch_size // mesh.size) * local_mesh.size

    reader = DetectionsReader(table)
    num_images = len(reader.image_ids)
    places = range(process * num_images // processes, (process + 1) * num_images // processes)
    boxes = TableBoxes(reader, dataset, places)
    refinement = {
        "model": settings.name,
        "config": settings.to_dict(),
        "step": step,
        "dataset": dataset.meta.get("name", str(dataset.directory)),
    }
    say(f"refine {table}: {num_images} images, {reader.num_rows} boxes", flush=True)
    with DetectionsWriter(
        output,
        dict(reader.metadata) | {"refinement": refinement},
        process_index=process,
        process_count=processes,
        masks=reader.has_masks,
    ) as writer:
        batches, members = proposal_batches(
            dataset, boxes, places, settings.data, batch_size=batch_size
        )
        progress = Progress(
            batches.num_batches, batch_size * processes, mesh.size, what="refine", say=say
        )
        _, _, sizes = boxes.pieces(places, settings.data.max_proposals)
        counts = np.where(members >= 0, sizes[members], 0) if len(sizes) else members
        # Batches go by canvas, rows by table: the boxes wait in an unnamed file that is mapped.
        first, total = np.cumsum(sizes) - sizes, int(sizes.sum())
        new = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(max(total, 1), 4))
        moved = np.zeros(total, bool)
        predict = announced(compiled_predict_step(model, local_mesh), "box refiner", say)

        def refined() -> Iterator[Rows]:
            started = (
                (
                    batch["image_size"],
                    predict(variables, distributed.to_global(batch, local_mesh, REFINER_FIELDS)),
                )
                for batch in progress.timed(batches)
            )
            # The host writes batch i while the devices work on batch i + 1.
            for number, (image_size, results) in enumerate(
                stoppable(behind(started), together=False)
            ):
                slots = members[number]
                rows = [first[m] + np.arange(sizes[m]) for m in slots[slots >= 0]]
                at = np.concatenate(rows)
                new[at], moved[at] = _rows(image_size, results, counts[number])
                progress.report(number + 1, {"boxes": int(counts[: number + 1].sum())})
            for start in range(0, total, _ROWS):
                end = min(start + _ROWS, total)
                yield Rows(new[start:end], moved[start:end])

        _write(writer, reader, places, refined())
        if batches.skipped_images:
            say(f"refine: {batches.skipped_images} unreadable photos keep their boxes")
    distributed.barrier("refine_table")


def _rows(
    image_size: Float[np.ndarray, "b 2"], results: dict[str, jax.Array], sizes: np.ndarray
) -> Rows:
    """What the table gets of a batch whose slots have `sizes` (b,) boxes."""
    boxes, refined = (np.asarray(distributed.to_host(results[name])) for name in Rows._fields)
    boxes = np.clip(boxes / box_ops.per_side(image_size)[:, None], 0.0, 1.0)
    real = np.arange(boxes.shape[1]) < sizes[:, None]
    return Rows(boxes[real], refined[real])


def _write(
    writer: DetectionsWriter, reader: DetectionsReader, places: range, batches: Iterator[Rows]
) -> None:
    """Puts the refined boxes, which come in table order, to the rows of the table."""
    pending = Rows(np.zeros((0, 4), np.float32), np.zeros(0, bool))
    empty = set(places)
    for chunk in reader.chunks(masks=reader.has_masks, images=places):
        parts = [pending]
        while sum(len(part.boxes) for part in parts) < len(chunk):
            parts.append(next(batches))
        rows = Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        pending = Rows(*(values[len(chunk) :] for values in rows))
        refined = rows.refined[: len(chunk), None]
        boxes = np.where(refined, rows.boxes[: len(chunk)], chunk.boxes)
        labels = np.array(chunk.labels)[chunk.label_index]
        starts = np.flatnonzero(np.diff(chunk.image_index, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(chunk)], strict=True):
            of_image = slice(start, stop)
            place = int(chunk.image_index[start])
            writer.add(
                reader.image_ids[place],
                labels[of_image].tolist(),
                chunk.scores[of_image],
                boxes[of_image],
                None if chunk.masks is None else list(chunk.masks[of_image]),
                None if chunk.mask_sizes is None else chunk.mask_sizes[of_image],
            )
            empty.remove(place)
    masks: list[bytes] | None = [] if reader.has_masks else None
    sizes = None if masks is None else np.zeros((0, 2), np.int32)
    for place in sorted(empty):
        writer.add(reader.image_ids[place], [], np.zeros(0), np.zeros((0, 4)), masks, sizes)


def mean_overlaps(
    dataset: Dataset, split: str, before: PathLike, after: PathLike
) -> dict[str, float]:
    """Mean IoU of the boxes of a table with the ground truth before and after refinement.

    Counted are the boxes with IoU of at least 0.5 with some ground-truth box (of any class, no
    group), which is also the one that they are compared with afterwards.

    Args:
      dataset: with the ground truth.
      split: images that count.
      before: the table that was refined.
      after: what it became.
    """
    tables = [TableBoxes(DetectionsReader(path), dataset) for path in (before, after)]
    images = dataset.split(split)
    sums, count = np.zeros(2), 0
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].tolist()
        annotated = [_objects(dataset, image) for image in chunk]
        before_and_after = [[table.image_boxes(image) for image in chunk] for table in tables]
        old, new = (np.concatenate(boxes).astype(np.float64) for boxes in before_and_after)
        gt_boxes = np.concatenate(annotated).astype(np.float64)
        gt_keys, keys = (
            np.repeat(np.arange(len(chunk)), [len(boxes) for boxes in per_image])
            for per_image in (annotated, before_and_after[0])
        )
        has_area = (old[:, 2:] > old[:, :2]).all(axis=1)
        old, new, keys = old[has_area], new[has_area], keys[has_area]
        iou, matched_idx = best_overlaps(old, keys, gt_boxes, gt_keys, _CHUNK, union=True)
        matched = iou >= _MATCH_IOU
        sums += [
            iou[matched].sum(),
            box_ops.paired_iou(new[matched], gt_boxes[matched_idx[matched]]).sum(),
        ]
        count += int(matched.sum())
    means = sums / max(count, 1)
    return {
        "Refinement/boxes": float(count),
        "Refinement/IoU_before": float(means[0]),
        "Refinement/IoU_after": float(means[1]),
    }


def _objects(dataset: Dataset, image: int) -> np.ndarray:
    """The annotated boxes of single objects."""
    boxes, _, flags = dataset.image_boxes(image)
    return boxes[flags & GROUP_OF == 0]
