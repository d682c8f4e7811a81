"""Adds masks to the boxes of a detections table.

    python -m segmentation.export --workdir=WORK --boxes=x.parquet --output=y.parquet
    python -m segmentation.export --config=... --voters=WORK1,WORK2,WORK3,WORK3:flip
        --boxes=x.parquet --output=y.parquet

Rows, scores and labels stay as they are. Boxes are cut as `config.test` says, and with --voters as
that of each work directory's own config.json does; `:flip` averages a network with itself on the
mirrored crop, as `config.test.flip` does. What the voters make of a pixel is decided by
`config.test.vote` and `config.test.threshold` (`common.masks.vote`) of --config.

A table of `detection.predict` says itself where its photos are; of others `config.data.dir` does.
With several hosts each writes the shard of its part of the photos into the folder --output.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Int, Int64

from common.data.dataset import Dataset
from common.data.table_photos import table_dataset
from common.io import run_flags
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.parallel import map_ordered
from common.io.paths import PathLike
from common.io.progress import Progress
from common.masks import rle, vote
from common.masks.paste import PASTING_THREADS, CropMaps, paste, pixel_window
from common.tables import DetectionsReader, DetectionsWriter
from common.tables.masked import RowMasks, write_with_masks
from common.tables.table import Detections
from common.training import command, distributed
from common.training.preemption import stoppable
from common.training.watchdog import StallWatchdog
from segmentation.crops.batches import BoxBatch, box_batches
from segmentation.inference import Voter
from segmentation.settings import RunSettings, read_run
from segmentation.voters import Network, Panel, open_network, open_voters, with_classes_of


def add_masks(
    settings: RunSettings,
    dataset: Dataset,
    networks: list[Network],
    voters: list[Voter],
    mesh: Mesh,
    boxes: PathLike,
    output: PathLike,
    *,
    say: Callable = print,
) -> int:
    """Writes the table `output` with the rows of `boxes` and their masks; returns their number.

    Args:
      settings: vote and threshold of `test`, `evaluation.batch_size`, `data.on_image_error`,
        `data.num_threads`.
      dataset: where the photos are.
      networks: trained networks.
      voters: who votes.
      mesh: devices of this process, which takes its part of the photos.
      boxes: detections table.
      output: Parquet file, or folder when there are several processes.
      say: where progress lines go.

    Raises:
      UserError: table without rows, photo or label that the dataset lacks.
    """
    rule, threshold = settings.test.vote, settings.test.threshold
    reader = DetectionsReader(boxes)
    if not reader.num_rows:
        raise UserError(f"{boxes}: found a table without rows, expected boxes to segment")
    image_rows = find_photos(dataset, reader)
    own = _part(len(reader.image_ids), jax.process_index(), jax.process_count())
    panel = Panel(networks, voters, rule, mesh, say)
    batch_size = -(-settings.evaluation.batch_size // mesh.size) * mesh.size
    metadata = {
        **reader.metadata,
        "segmentation": {
            "voters": [
                {
                    "model": networks[v.network].name,
                    "step": networks[v.network].step,
                    "flip": v.flip,
                    "crop": dataclasses.asdict(networks[v.network].test.crop),
                }
                for v in voters
            ],
            "vote": rule,
            "threshold": threshold,
        },
    }
    writer = DetectionsWriter(
        output,
        metadata,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        masks=True,
    )
    # A step is a box here, a part of all of them where there are several processes.
    total = -(-reader.num_rows // jax.process_count())
    progress = Progress(total, what="segment", unit="boxes", say=say)
    done = 0

    def outline(chunk: Detections) -> Iterator[RowMasks]:
        nonlocal done
        batches = box_batches(
            dataset,
            image_rows[chunk.image_index],
            chunk.boxes,
            panel.views,
            batch_size=batch_size,
            on_image_error=settings.data.on_image_error,
            num_threads=settings.data.num_threads,
        )
        pasted = map_ordered(
            functools.partial(block_masks, weights=panel.weights, rule=rule, threshold=threshold),
            started_blocks(panel, batches, chunk.label_index),
            threads=PASTING_THREADS,
            ahead=PASTING_THREADS,
        )
        for masks in stoppable(pasted, together=False):
            yield masks
            done += len(masks.rows)
            progress.report(done, last=done == total)

    with writer:
        write_with_masks(reader, writer, own, dataset.class_labels, outline)
    distributed.barrier("add_masks")
    return reader.num_rows


def find_photos(dataset: Dataset, reader: DetectionsReader) -> Int64[np.ndarray, " I"]:
    """Dataset rows of the photos that a table covers.

    Raises:
      UserError: one is not in the dataset.
    """
    rows = dataset.find_images(reader.image_ids)
    if (rows < 0).any():
        missing = reader.image_ids[int(np.argmax(rows < 0))]
        raise UserError(
            f"{reader.path}: image {missing!r} is not in {dataset.directory}, expected a table "
            f"of its photos ({int((rows < 0).sum())} of {len(rows)} are missing)"
        )
    return rows


def _part(count: int, index: int, parts: int) -> range:
    return range(count * index // parts, count * (index + 1) // parts)


def started_blocks(
    panel: Panel, batches: Iterator[BoxBatch], labels: Int[np.ndarray, " n"]
) -> Iterator[tuple[list[BoxBatch], list[jax.Array]]]:
    """Yields the batches of a block, one a view, and the maps (b, V, Y, X) that devices make."""
    block: list[BoxBatch] = []
    started: list[jax.Array] = []
    for batch in batches:
        if batch.view != len(block):
            raise RuntimeError(f"view {batch.view} follows {len(block)} views")
        classes = np.where(batch.rows >= 0, labels[np.maximum(batch.rows, 0)], -1)
        block.append(batch)
        started.append(panel.start(batch, classes.astype(np.int32)))
        if len(block) == len(panel.views):
            yield block, started
            block, started = [], []


def block_masks(
    started: tuple[list[BoxBatch], list[jax.Array]],
    weights: Sequence[int],
    rule: vote.Rule,
    threshold: float,
) -> RowMasks:
    """The masks of the real boxes of a block.

    The masks of boxes without area inside their photo, and of unreadable photos, are empty.

    Args:
      started: batches and maps of the block, from `started_blocks`.
      weights, rule, threshold: of `vote.combine`.
    """
    block, maps = started[0], distributed.to_host(started[1])
    first = block[0]
    slots = np.flatnonzero(first.rows >= 0)
    pixels = pixel_window(first.window, first.photo_size)
    masks = []
    for slot in slots:
        if not all(batch.image_valid[slot] for batch in block):
            masks.append(np.zeros((1, 1), bool))
            pixels[slot] = 0
            continue
        crops = [
            CropMaps(values[slot], tuple(batch.image_size[slot].astype(int)), batch.window[slot])
            for batch, values in zip(block, maps, strict=True)
        ]
        masks.append(paste(crops, pixels[slot], rule, threshold, weights))
    photo_sizes = np.maximum(first.photo_size[slots], 1)  # unreadable ones may have size 0
    counts = rle.encode_windows(masks, pixels[slots, :2], photo_sizes)
    return RowMasks(first.rows[slots], counts, photo_sizes)


def define_flags() -> None:
    flags.DEFINE_string("boxes", None, "Detections table with the boxes.")
    flags.DEFINE_string("output", None, "Parquet file to write (a folder with many hosts).")
    flags.DEFINE_list("voters", None, "Work directories, WORK or WORK:flip, instead of --workdir.")
    flags.DEFINE_integer("step", None, "Checkpoint of --workdir to use; default: the newest.")


def main():
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.voters):
        raise UserError("--workdir, --voters: expected one of them")
    if values.voters and values.config is None:
        raise UserError("--config: missing, expected the config whose test.vote decides (--voters)")
    _, say = command.start()
    mesh = distributed.make_mesh(jax.local_devices())
    if values.voters:
        settings = read_run(values.config)
        networks, voters = open_voters(values.voters, mesh)
    else:
        settings = command.read_trained(read_run, values.config, values.workdir, say)
        networks = [open_network(settings, values.workdir, values.step, mesh)]
        voters = [Voter(0, settings.test.flip)]
    own = table_dataset(DetectionsReader(values.boxes))
    dataset = with_classes_of(networks, own or command.open_dataset(settings.data.dir))
    with StallWatchdog.of(settings.log):
        what = (dataset, networks, voters, mesh, values.boxes, values.output)
        count = add_masks(settings, *what, say=say)
    say(f"wrote {values.output}: {count} boxes with masks, {len(voters)} voters", flush=True)


if __name__ == "__main__":
    run_flags.define_flags(config_required=False, workdir_required=False)
    define_flags()
    flags.mark_flags_as_required(["boxes", "output"])
    run_main(main)
