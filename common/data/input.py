"""Batches of photos for training and inference: plan -> read, decode, augment, pad.

Every image of a step is a pure function of (seed, step, slot), so a resumed run gets the batches of
an uninterrupted one and the slices of the hosts put together are the batch of a single host.
Annotations are looked up in the memory-mapped index image by image; nothing is copied ahead.

A batch is a dictionary (b: images of this host, M: data.max_boxes, G: data.max_ignore,
P: data.max_proposals, S: data.mask_size, K: classes of the run, H, W: the canvas of the step,
padded):
  image          uint8   (b, H, W, 3)  RGB, content top left, padding 0 (the model normalises);
                                       what a turned photo leaves of its content is a mean grey
  image_size     float32 (b, 2)        height, width of the content on the canvas
  original_size  int32   (b, 2)        height, width of the photo as displayed (after EXIF rotation)
  image_index    int32   (b,)          row of the dataset (those of several sources one after the
                                       other), -1 in the padding of the last batch
  image_valid    bool    (b,)          False: padding, or a photo that could not be read
where data.max_proposals is positive, also
  proposals      float32 (b, P, 4)     boxes of a detections table in its order, canvas pixels
  proposal_valid bool    (b, P)        which of them are real and have a visible area
and in training
  gt_boxes       float32 (b, M, 4)     xmin, ymin, xmax, ymax in canvas pixels
  gt_classes     int32   (b, M)
  gt_group_of    bool    (b, M)
  gt_valid       bool    (b, M)        which boxes are real
  gt_masks       uint8   (b, M, S, S/8)  with data.mask_size: the object's mask, cropped to its box
                                       on the canvas; bits along the last axis (np.packbits)
  gt_has_mask    bool    (b, M)        with data.mask_size: whether it has one; False in sources
                                       without masks, and where the box shows nothing of it
  ignore_boxes   float32 (b, G, 4)     in canvas pixels, where nothing is background: crowds,
                                       group-of boxes on demand, boxes beyond M, boxes of classes
                                       that the run lacks, whole photos of sources without boxes
  ignore_valid   bool    (b, G)
  drawn_class    int32   (b,)          the class that the plan drew the image for, -1: none
  labels         int8    (b, K)        with data.image_labels: 1 present, -1 absent, 0 unknown or
                                       cut away by a crop; expanded along the hierarchy
  class_known    bool    (b, K)        where some source has unknown classes: whether the source of
                                       the image says anything of the class
  source         int32   (b,)          with several sources: place of that of the image
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from common.data.augmentation import ElaborateAugmentation
from common.data.batches import Batches, StepMemo, generator, local_batch
from common.data.canvases import Canvas, is_portrait, orientations
from common.data.dataset import Dataset
from common.data.examples import PhotoLoader, Slot, TrainingLoader
from common.data.labels import VerifiedLabels
from common.data.plans.plan import TrainPlan
from common.data.proposals import TableBoxes
from common.data.settings import DataSettings
from common.data.sources import single_source

_TRAIN = 0  # stream of random numbers


class PhotoBatches(Batches):
    """Training batches, which also count what did not fit into them."""

    def __init__(
        self,
        loader: TrainingLoader,
        slot: Callable[[int], Slot],
        numbers: range,
        batch_size: int,
        settings: DataSettings,
    ):
        self._loader = loader
        super().__init__(
            loader,
            slot,
            numbers,
            batch_size,
            processes=settings.num_processes,
            num_threads=settings.num_threads,
            prefetch=settings.prefetch,
        )

    @property
    def dropped_boxes(self) -> int:
        """Boxes so far that did not fit into max_boxes (those loaded ahead too)."""
        return self._loader.dropped_boxes.count

    @property
    def dropped_ignore_boxes(self) -> int:
        """Ignore boxes so far that did not fit into max_ignore (those loaded ahead too)."""
        return self._loader.dropped_ignore_boxes.count

    @property
    def skipped_masks(self) -> int:
        """Masks left out so far because they cannot be read (those loaded ahead too)."""
        return 0 if self._loader.masks is None else self._loader.masks.errors.skipped

    def counts(self) -> dict[str, int]:
        return super().counts() | {
            "unreadable masks skipped": self.skipped_masks,
            "boxes beyond config.data.max_boxes ignored": self.dropped_boxes,
            "ignore boxes beyond config.data.max_ignore": self.dropped_ignore_boxes,
        }


def train_batches(
    dataset: Dataset,
    plan: TrainPlan,
    settings: DataSettings,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    proposals: TableBoxes | None = None,
) -> PhotoBatches:
    """Iterates over the batches of steps start_step ... start_step + num_steps - 1.

    Args:
      dataset: that of the run, whose classes and hierarchy are the run's.
      plan: from `common.data.plans.plan.train_plan`; its batch_size is that of all hosts together.
      settings: `config.data`.
      seed: of flips, scales, angles, crops and box subsets.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.
      proposals: boxes beside the annotated ones.

    Raises:
      UserError: a batch that the hosts cannot share; while iterating: a photo that cannot be read
        (unless 'skip').
    """
    local = local_batch(plan.batch_size, process_index, process_count)
    planned = StepMemo(lambda step: (plan.canvas(step), plan.batch(step)))

    def slot(number: int) -> Slot:
        step, place = divmod(number, local)
        place += process_index * local
        canvas, drawn = planned(step)
        return Slot(
            canvas,
            int(drawn.images[place]),
            int(drawn.classes[place]),
            generator(seed, _TRAIN, step, place),
            int(drawn.sources[place]),
        )

    labels = VerifiedLabels(dataset) if settings.image_labels else None
    augmentation = None
    if settings.elaborate.enabled:
        augmentation = ElaborateAugmentation.of(plan.sources, settings, plan.pools)
    loader = TrainingLoader(plan.sources, settings, proposals, labels, augmentation)
    numbers = range(start_step * local, (start_step + num_steps) * local)
    return PhotoBatches(loader, slot, numbers, local, settings)


def eval_batches(
    dataset: Dataset,
    split: str,
    settings: DataSettings,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates once over a split without augmentation, landscape photos first, then portraits.

    Host p gets images [p b, (p + 1) b) of each global batch: every image is on exactly one host,
    all hosts make the same number of batches (`num_batches`), and what the last one of an
    orientation lacks is padded with image_index -1, image_valid False.

    Args and errors: as `train_batches`; batch_size counts the images of all hosts together.
    """
    local = local_batch(batch_size, process_index, process_count)
    images = dataset.split(split)
    members, canvases = _by_canvas(dataset, images, settings, batch_size)

    def slot(number: int) -> Slot:
        batch, place = divmod(number, local)
        member = members[batch, process_index * local + place]
        return Slot(canvases[batch], int(images[member]) if member >= 0 else -1)

    return _inference_batches(dataset, images, settings, slot, len(members), local)


def proposal_batches(
    dataset: Dataset,
    proposals: TableBoxes,
    places: range,
    settings: DataSettings,
    *,
    batch_size: int,
) -> tuple[Batches, Int64[np.ndarray, "t b"]]:
    """Iterates over the proposals of a table without augmentation, on one host.

    A photo comes as often as its proposals need, P at a time; one without any does not come.

    Args:
      dataset: of the photos.
      proposals: boxes of the table.
      places: places in `proposals.images` of the images that are wanted.
      settings: as for `train_batches`; max_proposals is positive.
      batch_size: slots of a batch.

    Returns:
      The batches, landscape photos first, and for each of their slots the row of
      `proposals.pieces(places, P)` that it holds, -1 for padding.
    """
    images, first, _ = proposals.pieces(places, settings.max_proposals)
    members, canvases = _by_canvas(dataset, images, settings, batch_size)

    def slot(number: int) -> Slot:
        batch, place = divmod(number, batch_size)
        member = members[batch, place]
        if member < 0:
            return Slot(canvases[batch], -1)
        return Slot(canvases[batch], int(images[member]), first_proposal=int(first[member]))

    batches = _inference_batches(
        dataset, images, settings, slot, len(members), batch_size, proposals
    )
    return batches, members


def _by_canvas(
    dataset: Dataset, images: Int64[np.ndarray, " n"], settings: DataSettings, batch_size: int
) -> tuple[Int64[np.ndarray, "t B"], list[Canvas]]:
    """Places in `images` of the slots of each batch, -1: padding, and the canvas of the batch.

    A photo goes by its annotated size; one whose true size is of the other orientation is fitted
    into the canvas that it got.
    """
    landscape, portrait = orientations(settings.canvas)
    upright = is_portrait(dataset.image_sizes[images]) & (landscape != portrait)
    members, canvases = [], []
    for canvas, chosen in ((landscape, ~upright), (portrait, upright)):
        places = np.flatnonzero(chosen)
        padded = np.full(-(-len(places) // batch_size) * batch_size, -1, np.int64)
        padded[: len(places)] = places
        members.append(padded.reshape(-1, batch_size))
        canvases += [canvas] * len(members[-1])
    return np.concatenate(members), canvases


def _inference_batches(
    dataset: Dataset,
    images: Int64[np.ndarray, " n"],
    settings: DataSettings,
    slot: Callable[[int], Slot],
    num_batches: int,
    batch_size: int,
    proposals: TableBoxes | None = None,
) -> Batches:
    return Batches(
        PhotoLoader((single_source(dataset, images),), settings, proposals),
        slot,
        range(num_batches * batch_size),
        batch_size,
        processes=settings.num_processes,
        num_threads=settings.num_threads,
        prefetch=settings.prefetch,
    )
