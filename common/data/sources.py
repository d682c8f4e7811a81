"""The datasets of a run: which images, how often, and what each says of the run's classes.

Shape legend: n images of a split, m of them, K classes of the run, C classes of a dataset.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int32, Int64

from common.data.canvases import is_portrait
from common.data.dataset import Dataset
from common.data.settings import DataSettings, SourceSettings
from common.io.errors import UserError
from common.tables.class_mapping import ClassMapping, find_class_mapping
from common.tables.ranges import rows_of

_DENOMINATOR = 10**6  # of shares


@dataclasses.dataclass(frozen=True)
class Source:
    """The images of a split of a dataset, as a run sees them.

    Attributes:
      place: among the sources of the run.
      dataset: opened dataset directory.
      images: (n,) image indices of the split.
      first_index: `image_index` of the dataset's image 0; batches count the images of all datasets
        of the run, one after the other.
      share: of the slots of the run; shares need not add up to 1.
      num_classes: K.
      classes: (C,) class of the run of each class of the dataset, -1: none.
      known: (K,) of which classes of the run it says whether they are on an image.
      has_boxes: False: only image-level labels are used, and no place of a photo is background.
      has_masks: whether the masks of its boxes are used, by a run with masks.
    """

    place: int
    dataset: Dataset
    images: Int64[np.ndarray, " n"]
    first_index: int
    share: Fraction
    num_classes: int
    classes: Int32[np.ndarray, " C"]
    known: Bool[np.ndarray, " K"]
    has_boxes: bool
    has_masks: bool

    @property
    def portrait(self) -> Bool[np.ndarray, " n"]:
        """Which images are higher than wide; those of unknown size are taken as landscape."""
        return is_portrait(self.dataset.image_sizes[self.images])

    @property
    def summary(self) -> str:
        """A line about it for the start of a run."""
        return (
            f"{self.dataset.directory}, {len(self.images)} images, share {float(self.share):g}, "
            f"{np.count_nonzero(self.classes >= 0)} of its {len(self.classes)} classes are classes "
            f"of the run, {np.count_nonzero(~self.known)} of the run's are unknown there"
            + ("" if self.has_boxes else ", image labels only")
            + (", masks" if self.has_masks else "")
        )

    @property
    def mapped_names(self) -> list[str]:
        """Names of its classes that are classes of the run; none where all of them are."""
        mapped = np.flatnonzero(self.classes >= 0).tolist()
        everything = len(mapped) == len(self.classes)
        return [] if everything else [self.dataset.class_names[i] for i in mapped]


def open_sources(dataset: Dataset, data: DataSettings) -> tuple[Source, ...]:
    """The training images of a run: a split of its dataset, or `data.sources`.

    Args:
      dataset: that of the run, whose classes are the run's.
      data: `config.data`.

    Raises:
      UserError: no such split, a source without photos (or, with `max_images`, without any that
        has boxes of the run's classes), a class map that maps nothing.
    """
    if not data.sources:
        images = dataset.split(data.train_split)
        if data.mask_size and dataset.mask_offsets is None:
            raise UserError(
                f"{dataset.directory}: the dataset has no masks, config.data.mask_size is "
                f"{data.mask_size}, expected a set with masks (or mask_size 0)"
            )
        if data.label_steps.share:
            raise UserError(
                f"config.data.label_steps.share: found {data.label_steps.share}, expected 0: "
                "config.data.sources names no source of annotations 'labels'"
            )
        return (single_source(dataset, _some(dataset, data.train_split, images)),)
    opened: list[Source] = []
    first_index = 0
    for place, settings in enumerate(data.sources):
        source = _open(dataset, settings, place, first_index)
        first_index += source.dataset.num_images
        opened.append(source)
    if data.mask_size and not any(source.has_masks for source in opened):
        raise UserError(
            "config.data.sources: none has annotations 'boxes_masks', config.data.mask_size is "
            f"{data.mask_size}, expected at least one (or mask_size 0)"
        )
    if data.label_steps.share:
        for has_boxes, wanted in ((True, "boxes"), (False, "labels")):
            if not any(source.has_boxes == has_boxes for source in opened):
                raise UserError(
                    f"config.data.sources: none has annotations {wanted!r}, expected at least one "
                    f"of 'boxes' and one of 'labels': label_steps.share is {data.label_steps.share}"
                )
    return tuple(opened)


def single_source(dataset: Dataset, images: Int64[np.ndarray, " n"]) -> Source:
    """Images of the run's own dataset."""
    count = dataset.num_classes
    return Source(
        place=0,
        dataset=dataset,
        images=np.asarray(images, np.int64),
        first_index=0,
        share=Fraction(1),
        num_classes=count,
        classes=np.arange(count, dtype=np.int32),
        known=np.ones(count, bool),
        has_boxes=True,
        has_masks=dataset.mask_offsets is not None,
    )


def _open(run: Dataset, settings: SourceSettings, place: int, first_index: int) -> Source:
    same = settings.dir in ("", str(run.directory))
    dataset = run if same else Dataset.open(settings.dir)
    images = _some(dataset, settings.split, dataset.split(settings.split))
    field = f"config.data.sources[{place}]"
    if settings.annotations == "boxes_masks" and dataset.mask_offsets is None:
        raise UserError(
            f"{field}: annotations 'boxes_masks', but {dataset.directory} has no masks, expected "
            "a set with masks or annotations 'boxes'"
        )
    classes = map_classes(dataset.class_labels, run.class_labels, settings.class_map, field)
    offsets = dataset.label_offsets
    if settings.annotations == "labels" and not (offsets[images + 1] - offsets[images]).any():
        raise UserError(
            f"{field}: annotations 'labels', but no photo of split {settings.split!r} of "
            f"{dataset.directory} has an image-level label, expected verified labels"
        )
    if settings.max_images:
        shown = _with_objects(dataset, images, classes)
        if not len(shown):
            raise UserError(
                f"{field}: none of the {len(images)} photos of {dataset.directory} has a box of a "
                "class of the run, expected some for max_images"
            )
        spread = np.linspace(0, len(shown), min(settings.max_images, len(shown)), endpoint=False)
        images = shown[spread.astype(np.int64)]
    known = np.ones(run.num_classes, bool)
    if settings.others == "unknown":
        known[:] = False
        known[classes[classes >= 0]] = True
    return Source(
        place=place,
        dataset=dataset,
        images=np.asarray(images, np.int64),
        first_index=first_index,
        share=Fraction(settings.share).limit_denominator(_DENOMINATOR),
        num_classes=run.num_classes,
        classes=classes,
        known=known,
        has_boxes=settings.annotations != "labels",
        has_masks=settings.annotations == "boxes_masks",
    )


def _with_objects(
    dataset: Dataset, images: Int64[np.ndarray, " n"], classes: Int32[np.ndarray, " C"]
) -> Int64[np.ndarray, " m"]:
    """Those of the images that have a box of a class of the run."""
    place, rows = rows_of(dataset.box_offsets, images)
    has_object = np.zeros(len(images), bool)
    has_object[place[classes[dataset.box_classes[rows]] >= 0]] = True
    return images[has_object]


def map_classes(
    labels: Sequence[str], run_labels: Sequence[str], class_map: str, field: str
) -> Int32[np.ndarray, " C"]:
    """Class of the run of each class of a source, -1 where it has none.

    Args:
      labels: of the source.
      run_labels: of the run.
      class_map: '' for equal labels, or as `common.tables.class_mapping.find_class_mapping` takes
        it. Of a label with several meanings the first that the run has is taken.
      field: of the config, for errors.

    Raises:
      UserError: a bad file, or no class is mapped.
    """
    if class_map:
        mapping = find_class_mapping(class_map, rule="all")
    else:
        mapping = ClassMapping({label: (label,) for label in labels})
    place = {label: number for number, label in enumerate(run_labels)}
    candidates = [
        [place[target] for target in mapping.targets.get(label, ()) if target in place]
        for label in labels
    ]
    classes = np.array([known[0] if known else -1 for known in candidates], np.int32)
    if not (classes >= 0).any():
        raise UserError(
            f"{field}: no class of the source becomes one of the run by class_map {class_map!r}, "
            f"found labels such as {', '.join(map(repr, labels[:3]))}, expected such as "
            f"{', '.join(map(repr, run_labels[:3]))}"
        )
    return classes


def _some(dataset: Dataset, split: str, images: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    if not len(images):
        raise UserError(f"{dataset.directory}: split {split!r} has no images, expected some")
    return images
