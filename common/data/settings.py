"""`config.data`: what is read, and how photos become training batches."""

import dataclasses
from typing import Literal

from common.data import images
from common.io.settings import check

Sampler = Literal["uniform", "class_aware", "full_class_batch", "expert"]


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What `config.data` says of the dataset, its sampling and its batches.

    Attributes:
      dir: dataset directory written by scripts.prepare_data.
      train_split, eval_split: names of its splits.
      sampler: which images a step has, see `common.data.plan.make_plan`.
      positive_share: of the slots of sampler 'expert'; the others are images without boxes.
      batch_size: images of all hosts together.
      canvas: height and width, pixels, that photos are fitted into, see `images.fit`.
      pad_multiple: the canvas is padded up to multiples of it.
      max_boxes: M. Of an image with more, a random subset (another one each time) is used, with a
        box of the class that the image was drawn for.
      flip: mirrors half of the images left to right.
      scale_jitter: (min, max) of a uniform factor on the fitted size; above 1 crops at random.
      group_of: 'ordinary': group-of boxes are boxes, marked in gt_group_of; 'drop': left out.
      proposals: detections table of the training photos, whose boxes a refiner trains on.
      max_proposals: P, proposals of an image at a time; 0: batches have none.
      on_image_error: what a photo that cannot be read does. 'fatal': stops with an error naming it;
        'skip': leaves an empty slot, image_valid False, and prints the file once.
      num_threads: 0: twice as many as there are cores, at most 64.
      prefetch: batches made ahead.
    """

    dir: str
    train_split: str
    eval_split: str
    sampler: Sampler
    positive_share: float
    batch_size: int
    canvas: tuple[int, int]
    pad_multiple: int
    max_boxes: int
    flip: bool
    scale_jitter: tuple[float, float]
    group_of: Literal["ordinary", "drop"]
    proposals: str
    max_proposals: int
    on_image_error: Literal["fatal", "skip"]
    num_threads: int
    prefetch: int

    def __post_init__(self):
        low, high = self.scale_jitter
        for field, holds, expected in (
            ("positive_share", 0 < self.positive_share < 1, "a number between 0 and 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("canvas", min(self.canvas) >= 1, "height, width in pixels"),
            ("pad_multiple", self.pad_multiple >= 1, "at least 1"),
            ("max_boxes", self.max_boxes >= 1, "at least 1"),
            ("scale_jitter", 0 < low <= high, "0 < min <= max"),
            ("max_proposals", self.max_proposals >= 0, "0 (none) or more"),
            ("num_threads", self.num_threads >= 0, "0 (automatic) or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
        ):
            check(holds, field, getattr(self, field), expected)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the canvas padded up to `pad_multiple`."""
        return images.canvas_shape(self.canvas, self.pad_multiple)


@dataclasses.dataclass(frozen=True)
class LabelledDataSettings:
    """`config.data` of a classifier's run (detection.pretrain).

    Attributes:
      dir: folder with SPLIT/CLASS/PHOTO; with `tfds`: the folder of TFDS.
      tfds: name in TensorFlow Datasets, prepared as array_record.
      train_split, eval_split: names of the splits.
      batch_size: images of all hosts together.
      image_size: S, pixels.
      crop_area: (min, max) of a random crop's share of the photo's area.
      crop_aspect: (min, max) of its width over height.
      flip: mirrors half of the images left to right.
      eval_crop: of the short side, the middle square of which is evaluated.
      num_threads: 0: twice as many as there are cores, at most 64.
      prefetch: batches made ahead.
    """

    dir: str
    tfds: str
    train_split: str
    eval_split: str
    batch_size: int
    image_size: int
    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    flip: bool
    eval_crop: float
    num_threads: int
    prefetch: int

    def __post_init__(self):
        (low, high), (narrow, wide) = self.crop_area, self.crop_aspect
        for field, holds, expected in (
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("image_size", self.image_size >= 1, "at least 1"),
            ("crop_area", 0 < low <= high <= 1, "0 < min <= max <= 1"),
            ("crop_aspect", 0 < narrow <= wide, "0 < min <= max"),
            ("eval_crop", 0 < self.eval_crop <= 1, "more than 0, at most 1"),
            ("num_threads", self.num_threads >= 0, "0 (automatic) or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
        ):
            check(holds, field, getattr(self, field), expected)
