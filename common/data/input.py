"""Batches of photos for training and evaluation: plan -> read, decode, augment, pad.

Every image of a step is a pure function of (seed, step, slot), so a resumed run gets the batches of
an uninterrupted one and the slices of the hosts put together are the batch of a single host.
Annotations are looked up in the memory-mapped index image by image; nothing is copied ahead.

A batch is a dictionary (b: images of this host, M: data.max_boxes, P: data.max_proposals, H, W:
canvas padded up):
  image          uint8   (b, H, W, 3)  RGB, content top left, padding 0 (the model normalises)
  image_size     float32 (b, 2)        height, width of the content on the canvas
  original_size  int32   (b, 2)        height, width of the photo as displayed (after EXIF rotation)
  image_index    int32   (b,)          row of the dataset, -1 in the padding of the last batch
  image_valid    bool    (b,)          False: padding, or a photo that could not be read
in training also
  gt_boxes       float32 (b, M, 4)     xmin, ymin, xmax, ymax in canvas pixels
  gt_classes     int32   (b, M)
  gt_group_of    bool    (b, M)
  gt_valid       bool    (b, M)        which boxes are real
  drawn_class    int32   (b,)          the class that the plan drew the image for, -1: none
where data.max_proposals is given and positive, also
  proposals      float32 (b, P, 4)     boxes of a detections table in its order, canvas pixels
  proposal_valid bool    (b, P)        which of them are real and have a visible area
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from common.data.batches import Batches, StepMemo, generator, local_batch
from common.data.dataset import Dataset
from common.data.examples import ExampleLoader, Settings, Slot
from common.data.plan import Plan
from common.data.proposals import TableBoxes

_TRAIN, _EVAL = 0, 1  # streams of random numbers


def train_batches(
    dataset: Dataset,
    plan: Plan,
    data_config: Any,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    proposals: TableBoxes | None = None,
) -> "PhotoBatches":
    """Iterates over the batches of steps start_step ... start_step + num_steps - 1.

    Args:
      dataset: opened dataset directory.
      plan: from `common.data.plan.make_plan`; its batch_size is that of all hosts together.
      data_config: ConfigDict with the fields
        canvas: (height, width) that photos are fitted into, see `images.fit`.
        pad_multiple: the canvas is padded up to multiples of it.
        max_boxes: M. Of an image with more, a random subset (another one each time) is used, with
          a box of the class that the image was drawn for.
        flip: mirror half of the images left to right.
        scale_jitter: (min, max) of a uniform factor on the fitted size; above 1 crops at random.
        group_of: 'ordinary': group-of boxes are boxes, marked in gt_group_of; 'drop': left out.
        on_image_error: what a photo that cannot be read does. 'fatal': stops with an error naming
          it; 'skip': leaves an empty slot, image_valid False, and prints the file once.
        num_threads: 0: twice as many as there are cores, at most 64.
        prefetch: batches made ahead.
        max_proposals: P; fields without it have no proposals. Of an image with more, the best.
      seed: of flips, scales and box subsets.
      start_step: first step.
      num_steps: number of batches to make.
      process_index: this host; it gets slots [p b, (p + 1) b) of each batch.
      process_count: number of hosts.
      proposals: boxes beside the annotated ones.

    Raises:
      UserError: bad config; while iterating: a photo that cannot be read (unless 'skip').
    """
    local = local_batch(plan.batch_size, process_index, process_count)
    planned = StepMemo(plan.batch)

    def slot(number: int) -> Slot:
        step, place = divmod(number, local)
        place += process_index * local
        image_indices, drawn_classes = planned(step)
        rng = generator(seed, _TRAIN, step, place)
        return Slot(int(image_indices[place]), int(drawn_classes[place]), rng)

    numbers = range(start_step * local, (start_step + num_steps) * local)
    return PhotoBatches(dataset, Settings.of(data_config), slot, numbers, local, proposals)


def eval_batches(
    dataset: Dataset,
    split: str,
    data_config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "PhotoBatches":
    """Iterates once over a split, in its order, without augmentation.

    Host p gets images [p b, (p + 1) b) of each global batch: every image is on exactly one host,
    all hosts make the same number of batches (`num_batches`), and what the last one lacks is
    padded with image_index -1, image_valid False. There are no ground-truth fields: metrics take
    the truth from the dataset.

    Args and errors: as `train_batches`; batch_size counts the images of all hosts together.
    """
    local = local_batch(batch_size, process_index, process_count)
    settings = _unaugmented(data_config)
    images = dataset.split(split)

    def slot(number: int) -> Slot:
        batch, place = divmod(number, local)
        position = batch * batch_size + process_index * local + place
        index = int(images[position]) if position < len(images) else -1
        return Slot(index, -1, generator(0, _EVAL, 0, position))

    num_batches = -(-len(images) // batch_size)
    numbers = range(num_batches * local)
    return PhotoBatches(dataset, settings, slot, numbers, local, ground_truth=False)


def proposal_batches(
    dataset: Dataset, proposals: TableBoxes, places: range, data_config: Any, *, batch_size: int
) -> "PhotoBatches":
    """Iterates over the proposals of a table in its order, without augmentation, on one host.

    A photo comes as often as its proposals need, P at a time; one without any does not come. The
    slots are `proposals.pieces(places, P)`.

    Args:
      dataset: of the photos.
      proposals: boxes of the table.
      places: places in `proposals.images` of the images that are wanted.
      data_config: as for `train_batches`; max_proposals is positive.
      batch_size: slots of a batch; what the last one lacks is padded.
    """
    settings = _unaugmented(data_config)
    images, first, _ = proposals.pieces(places, settings.max_proposals)

    def slot(number: int) -> Slot:
        rng = generator(0, _EVAL, 0, number)
        if number >= len(images):
            return Slot(-1, -1, rng)
        return Slot(int(images[number]), -1, rng, int(first[number]))

    numbers = range(-(-len(images) // batch_size) * batch_size)
    return PhotoBatches(dataset, settings, slot, numbers, batch_size, proposals, ground_truth=False)


def _unaugmented(data_config: Any) -> Settings:
    return dataclasses.replace(Settings.of(data_config), flip=False, scale_jitter=(1.0, 1.0))


class PhotoBatches(Batches):
    """Batches of photos and their boxes."""

    def __init__(
        self,
        dataset: Dataset,
        settings: Settings,
        slot: Callable[[int], Slot],
        numbers: range,
        batch_size: int,
        proposals: TableBoxes | None = None,
        *,
        ground_truth: bool = True,
    ):
        self._loader = ExampleLoader(dataset, settings, proposals, ground_truth=ground_truth)
        super().__init__(
            self._loader,
            slot,
            numbers,
            batch_size,
            num_threads=settings.num_threads,
            prefetch=settings.prefetch,
        )

    @property
    def dropped_boxes(self) -> int:
        """Boxes so far that did not fit into max_boxes (those loaded ahead too)."""
        return self._loader.dropped_boxes
