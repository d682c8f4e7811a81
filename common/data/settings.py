"""`config.data`: what is read, and how photos become training batches."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from common.io.settings import check

Sampler = Literal["uniform", "class_aware", "full_class_batch", "expert", "repeat_factor"]
CLASS_SAMPLERS = ("class_aware", "full_class_batch", "expert")  # those that draw classes


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """One of the datasets of a training, see `common.data.sources`.

    Attributes:
      dir: dataset directory; '' for that of the run.
      split: name of its training split.
      share: of the slots of the run; shares need not add up to 1.
      class_map: the run's classes of its labels: '' where the labels are the same, else a shipped
        map such as coco_to_openimages, or FILE.csv:COLUMN_OF_THE_SOURCE:COLUMN_OF_THE_RUN.
      annotations: what is used of it. 'boxes_masks': masks too, where the run has masks; 'labels':
        image-level labels only; then no place of its photos is background.
      others: what the run's classes that it lacks are on its photos. 'unknown': batches say so in
        class_known; 'absent': an object of such a class would be background.
      max_images: of the photos with boxes of the run's classes so many are used, spread evenly over
        the split; 0: all photos.
    """

    dir: str = ""
    split: str = "train"
    share: float = 1.0
    class_map: str = ""
    annotations: Literal["boxes", "boxes_masks", "labels"] = "boxes"
    others: Literal["absent", "unknown"] = "absent"
    max_images: int = 0

    def __post_init__(self):
        most = 0 if self.annotations == "labels" else math.inf
        expected = "0 or more" if most else "0: annotations 'labels' have no boxes"
        check(0 <= self.max_images <= most, "max_images", self.max_images, expected)
        holds = self.share >= 1e-5 and math.isfinite(self.share)
        check(holds, "share", self.share, "a positive number (at least 1e-5, finite)")


@dataclasses.dataclass(frozen=True)
class ElaborateSettings:
    """Elaborate augmentation, see `common.data.augmentation`.

    Attributes:
      scale: how a photo is cropped around a box of the class that it was drawn for. 'none': not;
        'crop': a window of the photo, fitted into the canvas; 'resize': the photo is shrunk or
        enlarged, of which the canvas shows a window.
      rotate: turn photos, those of classes of long boxes more.
      boxes: what a turned box becomes. 'hull': the box around its corners; 'ellipse': the tighter
        one around the ellipse that fills it.
      max_zoom: by how much a box is at most enlarged (with 'resize' also shrunk) against the whole
        photo fitted into the canvas.
    """

    scale: Literal["none", "crop", "resize"]
    rotate: bool
    boxes: Literal["hull", "ellipse"]
    max_zoom: float

    def __post_init__(self):
        holds = 1 <= self.max_zoom < math.inf
        check(holds, "max_zoom", self.max_zoom, "at least 1, finite")

    @property
    def enabled(self) -> bool:
        return self.rotate or self.scale != "none"


@dataclasses.dataclass(frozen=True)
class LabelStepSettings:
    """Steps whose photos are all of sources with annotations 'labels'; no other step has those.

    Attributes:
      share: of the steps, rounded to hundredths; 0: photos of such sources are mixed into the
        batches of the others.
      canvas: short and long side of these steps, pixels; (): canvas and scales of the run.
    """

    share: float
    canvas: tuple[int, ...]

    def __post_init__(self):
        holds = self.share == 0 or 0.01 <= self.share <= 0.99
        check(holds, "share", self.share, "0 (off) or a number from 0.01 to 0.99")
        holds = not self.canvas or (len(self.canvas) == 2 and 1 <= self.canvas[0] <= self.canvas[1])
        check(holds, "canvas", self.canvas, "() or (short, long) side in pixels")

    @property
    def exact_share(self) -> Fraction:
        """`share` in hundredths."""
        return Fraction(self.share).limit_denominator(100)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What `config.data` says of the dataset, its sampling and its batches.

    Attributes:
      dir: dataset directory written by scripts.prepare_data, whose classes are the run's.
      train_split, eval_split: names of its splits.
      sources: what is trained on instead of train_split; (): train_split. With an empty `dir` the
        run's dataset is that of the first source.
      label_steps: steps of their own for sources of image-level labels.
      sampler: which images a step has, see `common.data.plans.plan.train_plan`.
      positive_share: of the slots of sampler 'expert'; the others are images without boxes.
      repeat_threshold: of sampler 'repeat_factor': a class on this share of the annotated photos
        or more is not repeated (LVIS' t).
      pools: file of the classes that are drawn from each other's photos too, see
        `common.data.plans.pools`; '' for none. Of samplers by class.
      batch_size: images of all hosts together.
      canvas: short and long side, pixels, that photos are fitted into, each in its own
        orientation, see `common.data.canvases`.
      scales: short sides of multi-scale training, one a step; (): that of the canvas.
      pad_multiple: canvases are padded up to multiples of it.
      max_boxes: M. Of an image with more, a random subset (another one each time) is used, with a
        box of the class that the image was drawn for; the other boxes are ignored.
      max_ignore: G, ignore boxes of an image; of more, the largest are kept.
      flip: mirrors half of the images left to right.
      scale_jitter: (min, max) of a uniform factor on the fitted size; above 1 crops at random.
      elaborate: the paper's augmentation; with its `scale` instead of scale_jitter.
      group_of: 'ordinary': group-of boxes are boxes, marked in gt_group_of; 'ignore': ignore boxes;
        'drop': left out, so that their objects are background. Crowds are always ignore boxes.
      mask_size: S, pixels of the side of the objects' masks, each of its box; 0: batches have none.
      image_labels: whether batches have `labels`, what was verified of each class.
      proposals: detections table of the training photos, whose boxes a refiner trains on.
      max_proposals: P, proposals of an image at a time; 0: batches have none.
      on_image_error: what a photo that cannot be read does. 'fatal': stops with an error naming it;
        'skip': leaves an empty slot, image_valid False, and prints the file once.
      num_processes: that load photos. 1: this one; 0: one for every 4 cores of the machine, but
        this one alone where there are fewer than 16, or few photos to load.
      num_threads: of all of them; 0: twice as many as there are cores, at most 64 a process.
      prefetch: batches made ahead.
    """

    dir: str
    train_split: str
    eval_split: str
    sources: tuple[SourceSettings, ...]
    label_steps: LabelStepSettings
    sampler: Sampler
    positive_share: float
    repeat_threshold: float
    pools: str
    batch_size: int
    canvas: tuple[int, int]
    scales: tuple[int, ...]
    pad_multiple: int
    max_boxes: int
    max_ignore: int
    flip: bool
    scale_jitter: tuple[float, float]
    elaborate: ElaborateSettings
    group_of: Literal["ordinary", "ignore", "drop"]
    mask_size: int
    image_labels: bool
    proposals: str
    max_proposals: int
    on_image_error: Literal["fatal", "skip"]
    num_processes: int
    num_threads: int
    prefetch: int

    def __post_init__(self):
        low, high = self.scale_jitter
        for field, holds, expected in (
            ("positive_share", 0 < self.positive_share < 1, "a number between 0 and 1"),
            ("repeat_threshold", 0 <= self.repeat_threshold <= 1, "a share of the photos, 0..1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("canvas", 1 <= self.canvas[0] <= self.canvas[1], "(short, long) side in pixels"),
            ("scales", all(side >= 1 for side in self.scales), "short sides in pixels"),
            ("pad_multiple", self.pad_multiple >= 1, "at least 1"),
            ("max_boxes", self.max_boxes >= 1, "at least 1"),
            ("max_ignore", self.max_ignore >= 1, "at least 1"),
            ("scale_jitter", 0 < low <= high < math.inf, "0 < min <= max, both finite"),
            (
                "scale_jitter",
                self.elaborate.scale == "none" or (low, high) == (1.0, 1.0),
                f"(1.0, 1.0) beside elaborate.scale {self.elaborate.scale!r}",
            ),
            (
                "scale_jitter",
                high <= 1 or all(source.annotations != "labels" for source in self.sources),
                "at most 1 with a source of annotations 'labels', which are of whole photos",
            ),
            (
                "pools",
                not self.pools or self.sampler in CLASS_SAMPLERS,
                f"'' with sampler {self.sampler!r}; pools are of {', '.join(CLASS_SAMPLERS)}",
            ),
            ("max_proposals", self.max_proposals >= 0, "0 (none) or more"),
            (
                "mask_size",
                self.mask_size >= 0 and self.mask_size % 8 == 0,
                "0 (no masks) or a positive multiple of 8",
            ),
            ("num_processes", self.num_processes >= 0, "0 (automatic) or more"),
            ("num_threads", self.num_threads >= 0, "0 (automatic) or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
            (
                "sources",
                not (self.sources and self.max_proposals),
                "(): the proposals of a refiner belong to one dataset",
            ),
        ):
            check(holds, field, getattr(self, field), expected)

    @property
    def directory(self) -> str:
        """Of the run's dataset."""
        return self.dir or (self.sources[0].dir if self.sources else "")

    @property
    def of_label_steps(self) -> "DataSettings":
        """The same with the canvas of the steps of image-level labels."""
        if not (canvas := self.label_steps.canvas):
            return self
        return dataclasses.replace(self, canvas=(canvas[0], canvas[1]), scales=())

    @property
    def some_unknown(self) -> bool:
        """Whether some photos may show classes of the run of which their source says nothing."""
        return any(source.others == "unknown" for source in self.sources)


@dataclasses.dataclass(frozen=True)
class LabelledDataSettings:
    """`config.data` of a classifier's run (detection.pretrain).

    Attributes:
      dir: folder with SPLIT/CLASS/PHOTO; with `tfds`: the folder of TFDS.
      tfds: name in TensorFlow Datasets, prepared as array_record.
      dataset: dataset directory, whose photos show any number of classes: of some it was verified
        that they are present or absent.
      sampler: 'uniform', or 'class_aware': classes equally often, then one of their photos.
      train_split, eval_split: names of the splits.
      batch_size: images of all hosts together.
      image_size: S, pixels.
      crop_area: (min, max) of a random crop's share of the photo's area.
      crop_aspect: (min, max) of its width over height.
      flip: mirrors half of the images left to right.
      eval_crop: of the short side, the middle square of which is evaluated.
      num_processes: that load photos. 1: this one; 0: one for every 4 cores of the machine, but
        this one alone where there are fewer than 16, or few photos to load.
      num_threads: of all of them; 0: twice as many as there are cores, at most 64 a process.
      prefetch: batches made ahead.
    """

    dir: str
    tfds: str
    dataset: str
    sampler: Literal["uniform", "class_aware"]
    train_split: str
    eval_split: str
    batch_size: int
    image_size: int
    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    flip: bool
    eval_crop: float
    num_processes: int
    num_threads: int
    prefetch: int

    def __post_init__(self):
        (low, high), (narrow, wide) = self.crop_area, self.crop_aspect
        for field, holds, expected in (
            ("dataset", not (self.dataset and (self.dir or self.tfds)), "'' beside dir or tfds"),
            ("sampler", not self.tfds or self.sampler == "uniform", "'uniform' with tfds"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("image_size", self.image_size >= 1, "at least 1"),
            ("crop_area", 0 < low <= high <= 1, "0 < min <= max <= 1"),
            ("crop_aspect", 0 < narrow <= wide < math.inf, "0 < min <= max, both finite"),
            ("eval_crop", 0 < self.eval_crop <= 1, "more than 0, at most 1"),
            ("num_processes", self.num_processes >= 0, "0 (automatic) or more"),
            ("num_processes", not self.tfds or self.num_processes <= 1, "0 or 1 with tfds"),
            ("num_threads", self.num_threads >= 0, "0 (automatic) or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
        ):
            check(holds, field, getattr(self, field), expected)
