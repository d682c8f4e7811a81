"""Which boxes of a dataset are instances: they have a mask and are no groups.

Shape legend: n instances of a split, m boxes, K classes.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt64

from common.data.box_shapes import medians, photo_sizes, pixel_sides
from common.data.dataset import GROUP_OF, Dataset
from common.data.plans.permutation import permute
from common.io.errors import UserError
from common.tables.ranges import rows_of

_CHUNK = 1 << 16  # images looked at at once


@dataclasses.dataclass(frozen=True)
class Instances:
    """The instances of a split, image by image in its order.

    Attributes:
      rows: of `dataset.boxes`.
      images: index of the image of each.
      classes: of each.
    """

    rows: Int64[np.ndarray, " n"]
    images: Int32[np.ndarray, " n"]
    classes: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, number: int, key: UInt64[np.ndarray, " 1"]) -> "Instances":
        """Random `number` of them, in the same order; all where there are no more.

        The sample is a function of `key` alone: the same on every host and after a resume.
        """
        if number >= len(self):
            return self
        chosen = np.sort(permute(np.arange(number), len(self), key))
        return Instances(self.rows[chosen], self.images[chosen], self.classes[chosen])


def find_instances(dataset: Dataset, split: str) -> Instances:
    """All boxes of a split that have a mask and an area inside the photo, and are not group-of.

    Boxes of classes that were not segmented have no masks, so they are none.

    Raises:
      UserError: no such split, or it has no instance.
    """
    images = np.asarray(dataset.split(split), np.int64)
    offsets = dataset.mask_offsets
    if offsets is None:
        raise UserError(
            f"{dataset.directory}: the dataset has no masks, expected one prepared from files with "
            "masks (scripts.prepare_data openimages|coco|lvis)"
        )
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(images), _CHUNK):
        part = images[first : first + _CHUNK]
        owner, rows = rows_of(dataset.box_offsets, part)
        has_mask = offsets[rows + 1] > offsets[rows]
        keep = np.flatnonzero(has_mask & _may_have_mask(dataset, rows))
        owner, rows = owner[keep], rows[keep]
        parts.append((rows, part[owner].astype(np.int32), dataset.box_classes[rows]))
    if not sum(len(rows) for rows, *_ in parts):
        raise UserError(
            f"{dataset.directory}: split {split!r} has no box with a mask that is not group-of, "
            f"expected instances to cut ({len(images)} images)"
        )
    return Instances(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _may_have_mask(dataset: Dataset, rows: Int64[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    boxes = np.clip(dataset.boxes[rows], 0.0, 1.0)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return has_area & (dataset.box_flags[rows] & GROUP_OF == 0)


def median_aspects(dataset: Dataset, instances: Instances) -> Float[np.ndarray, " K"]:
    """Median over the instances of a class of long side / short side in pixels; 1 without any."""
    sizes = photo_sizes(dataset, instances.images)
    sides = pixel_sides(dataset.boxes[instances.rows], sizes)
    aspects = sides.max(axis=1) / sides.min(axis=1)
    return medians(instances.classes, aspects, dataset.num_classes)[1]
