"""`config.data` of segmenters."""

import dataclasses
from typing import Literal

from common.io.settings import check
from segmentation.crops.windows import CropSize


def check_canvases(canvases: tuple[tuple[int, int], ...]) -> None:
    """Raises a `FieldError` unless there is a canvas and all sides are positive."""
    holds = bool(canvases) and min(min(canvas) for canvas in canvases) >= 1
    check(holds, "canvases", canvases, "pairs (height, width) in pixels")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which boxes are cut, how, and by how many threads.

    Attributes:
      dir: dataset directory with masks, written by scripts.prepare_data.
      train_split, eval_split: names of the splits.
      sampler: 'uniform': an endless stream of permutations of the instances; 'class_aware': of
        permutations of the classes, each taking the next of its own permuted instances.
      max_instances: train on a random sample of that many instances, a function of the seed; 0: on
        all.
      batch_size: crops of all hosts together.
      crop: their size.
      canvases: allowed (height, width); a crop that none holds is shrunk.
      group_steps: steps whose crops are sorted by aspect into batches; more sort better and need
        more crops to be planned at once.
      jitter: share of its length by which each side of an annotated box may move, below 0.5.
      rotate: turn crops, those of classes of long boxes more (`rotation.rotation_deviations`).
      flip: mirror half of the crops.
      proposals: path of a detections table, or '' for none. Its boxes that match an instance (of
        the same label, IoU at least 0.5) are cut as they are, instead of the annotated box,
      proposal_share: of the time.
      on_image_error: what a photo or mask that cannot be read does. 'fatal': stops with an error
        naming it; 'skip': leaves an empty slot, image_valid False, and prints the file once.
      num_processes: that load photos. 1: this one; 0: one for every 4 cores of the machine, but
        this one alone where there are fewer than 16, or few photos to load.
      num_threads: of all of them; 0: twice as many as there are cores, at most 64 a process.
      prefetch: batches made ahead.
    """

    dir: str
    train_split: str
    eval_split: str
    sampler: Literal["uniform", "class_aware"]
    max_instances: int
    batch_size: int
    crop: CropSize
    canvases: tuple[tuple[int, int], ...]
    group_steps: int
    jitter: float
    rotate: bool
    flip: bool
    proposals: str
    proposal_share: float
    on_image_error: Literal["fatal", "skip"]
    num_processes: int
    num_threads: int
    prefetch: int

    def __post_init__(self):
        check_canvases(self.canvases)
        for field, holds, expected in (
            ("max_instances", self.max_instances >= 0, "0 (all) or more"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("group_steps", self.group_steps >= 1, "at least 1"),
            ("jitter", 0 <= self.jitter < 0.5, "a share from 0 to below 0.5"),
            ("proposal_share", 0 <= self.proposal_share <= 1, "a share between 0 and 1"),
            ("num_processes", self.num_processes >= 0, "0 (automatic) or more"),
            ("num_threads", self.num_threads >= 0, "0 (automatic) or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
        ):
            check(holds, field, getattr(self, field), expected)
