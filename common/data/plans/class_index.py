"""Which images a class is drawn from.

Shape legend: n images of a split, K classes with at least one image, P pairs (class, image
containing it).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from common.data.dataset import Dataset
from common.data.dataset_format import ABSENT
from common.data.plans.streams import SHARES, ClassImages
from common.data.sources import Source
from common.tables.ranges import rows_of

_MAX_NAMED = 10  # classes that a line spells out
_MAX_REPEAT = 2.0  # times the draws of an average image of its class that an image gets


def images_by_class(
    source: Source, ignore_flags: int = 0, chunk: int = 65536
) -> tuple[Int32[np.ndarray, " K"], ClassImages]:
    """Table class -> images of a source with at least one box of it (labels as annotated).

    A source of image labels has the images on which a class was verified as present.

    Args:
      source: whose classes are those of the run.
      ignore_flags: boxes with any of these bits do not count.
      chunk: images looked at at once.

    Returns:
      Classes that have images, ascending; for each its images in the order of the split.
    """
    columns = source.num_classes
    pair_classes, pair_images = [], []
    for first, place, classes in annotated_images(source, ignore_flags, chunk):
        pair_classes.append(classes.astype(np.int32))
        pair_images.append(source.images[first + place].astype(np.int32))
    classes, members = np.concatenate(pair_classes), np.concatenate(pair_images)
    counts = np.bincount(classes, minlength=columns)
    present = np.flatnonzero(counts)
    members = members[np.argsort(classes, kind="stable")]
    return present.astype(np.int32), ClassImages(_offsets(counts[present]), members)


def annotated_images(
    source: Source, ignore_flags: int = 0, chunk: int = 65536
) -> Iterator[tuple[int, Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]]:
    """All pairs (image, class that it has at least one object of), some images at a time.

    Args: as `images_by_class`.

    Yields:
      first place in the split of the images looked at, the places of the pairs' images after it,
      ascending, and the pairs' classes, ascending for each image.
    """
    columns = source.num_classes
    for first in range(0, len(source.images), chunk):
        part = source.images[first : first + chunk]
        place, classes = annotated_classes(source, part, ignore_flags)
        pairs = np.sort(place * columns + classes)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique hashes, 30 times slower here
        yield first, pairs // columns, pairs % columns


def annotated_classes(
    source: Source, images: Int64[np.ndarray, " n"], ignore_flags: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """For all objects of `images` whose class the run has: place in `images`, class of the run."""
    dataset: Dataset = source.dataset
    if source.has_boxes:
        place, rows = rows_of(dataset.box_offsets, images)
        classes = source.classes[dataset.box_classes[rows]]
        keep = classes >= 0
        if ignore_flags:
            keep &= np.asarray(dataset.box_flags[rows]) & ignore_flags == 0
        return place[keep], classes[keep]
    return _verified_classes(source, images, absent=False)


def _verified_classes(
    source: Source, images: Int64[np.ndarray, " n"], *, absent: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The same for image-level labels of classes that are present, or of those that are not."""
    dataset = source.dataset
    place, rows = rows_of(dataset.label_offsets, images)
    classes = source.classes[dataset.label_classes[rows]]
    is_absent = np.asarray(dataset.label_confidences[rows]) == ABSENT
    keep = (classes >= 0) & (is_absent == absent)
    return place[keep], classes[keep]


def absent_counts(source: Source, chunk: int = 65536) -> tuple[int, int]:
    """Of how many classes it was verified that an image lacks them, and on how many images."""
    lacking, images = np.zeros(source.num_classes, bool), 0
    for first in range(0, len(source.images), chunk):
        part = source.images[first : first + chunk]
        place, classes = _verified_classes(source, part, absent=True)
        lacking[classes] = True
        images += int(np.count_nonzero(np.diff(place, prepend=-1)))  # places ascend
    return int(np.count_nonzero(lacking)), images


def labelled_classes(source: Source, class_names: Sequence[str]) -> str:
    """A line about the classes that the photos of a source of image-level labels are known to show
    and to lack, which names those of the run that are on none.

    Args:
      source: of image-level labels.
      class_names: of the run's classes.
    """
    classes, images = images_by_class(source)
    lacking, places = absent_counts(source)
    missing = np.setdiff1d(np.arange(source.num_classes), classes).tolist()
    named = [class_names[number] for number in missing[:_MAX_NAMED]]
    more = f" and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
    return (
        f"{source.dataset.directory}, {len(source.images)} photos, {len(classes)} classes are "
        f"verified on {len(np.unique(images.members))} of them"
        + (f", on none: {', '.join(named)}{more}" if missing else "")
        + f"; {lacking} verified absent on {places}"
        + ("" if places else " (note: nothing there says what is not on a photo)")
    )


def of_orientation(
    images: ClassImages, chosen: Bool[np.ndarray, " P"], share: float
) -> tuple[ClassImages, ClassImages, Int64[np.ndarray, " K"]]:
    """What a class draws in the steps of one orientation.

    Its own images of that orientation; but where they are so few that each would be drawn more than
    `_MAX_REPEAT` times as often as the average image of the class, the rest of the draws goes to
    its other images, which are then fitted into a canvas of the other orientation. A class without
    images of this orientation draws all from the others.

    Args:
      images: of all classes.
      chosen: which of `images.members` have the orientation.
      share: of the steps that have it.

    Returns:
      Own images, other images, and the share of the own (K,) in units of 1 / SHARES.
    """
    row = np.repeat(np.arange(len(images.offsets) - 1), np.diff(images.offsets))
    own, others = (
        ClassImages(
            _offsets(np.bincount(row[part], minlength=len(images.offsets) - 1)),
            images.members[part],
        )
        for part in (chosen, ~chosen)
    )
    fraction = np.diff(own.offsets) / np.diff(images.offsets)
    units = np.minimum(np.ceil(SHARES * _MAX_REPEAT * fraction / share), SHARES).astype(np.int64)
    units[fraction == 1] = SHARES
    return own, others, units


def _offsets(counts: Int64[np.ndarray, " K"]) -> Int64[np.ndarray, " K+1"]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
