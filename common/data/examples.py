"""One slot of a batch: photo and boxes on the canvas, augmented, padded. NumPy and Pillow only.

Shape legend: H, W canvas; M = max_boxes; P = max_proposals; n boxes of an image.
"""

import dataclasses
import sys
import threading
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import DTypeLike

from common.data import images
from common.data.batches import Example, Fields
from common.data.dataset import GROUP_OF, Dataset
from common.data.photo_errors import PhotoErrors
from common.data.proposals import TableBoxes
from common.io.errors import UserError


@dataclasses.dataclass(frozen=True)
class Slot:
    """What is to be put into one place of a batch.

    Attributes:
      index: image index, -1 for padding.
      drawn_class: class the image was drawn for, -1: none.
      rng: random numbers of this slot.
      first_proposal: the first of the image's proposals that this slot has.
    """

    index: int
    drawn_class: int
    rng: np.random.Generator
    first_proposal: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked fields of the data config; see `common.data.input.train_batches`."""

    canvas: tuple[int, int]
    shape: tuple[int, int]  # canvas padded up to pad_multiple
    max_boxes: int
    flip: bool
    scale_jitter: tuple[float, float]
    group_of: str
    on_image_error: str
    num_threads: int
    prefetch: int
    max_proposals: int  # 0: examples have no proposals

    @classmethod
    def of(cls, config: Any) -> "Settings":
        """Reads a data config.

        Raises:
          UserError: a field is out of range.
        """
        canvas = tuple(int(side) for side in config.canvas)
        jitter = tuple(float(value) for value in config.scale_jitter)
        max_proposals = getattr(config, "max_proposals", 0)
        requirements = {
            "canvas": (len(canvas) == 2 and min(canvas) >= 1, "height, width in pixels"),
            "pad_multiple": (config.pad_multiple >= 1, "at least 1"),
            "max_boxes": (config.max_boxes >= 1, "at least 1"),
            "scale_jitter": (len(jitter) == 2 and 0 < jitter[0] <= jitter[-1], "0 < min <= max"),
            "group_of": (config.group_of in ("ordinary", "drop"), "'ordinary' or 'drop'"),
            "on_image_error": (config.on_image_error in ("fatal", "skip"), "'fatal' or 'skip'"),
            "num_threads": (config.num_threads >= 0, "0 (automatic) or more"),
            "prefetch": (config.prefetch >= 1, "at least 1"),
            "max_proposals": (max_proposals >= 0, "0 (none) or more"),
        }
        for field, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"data.{field} is {getattr(config, field)!r}: expected {expected}")
        return cls(
            canvas=canvas,
            shape=images.canvas_shape(canvas, config.pad_multiple),
            max_boxes=config.max_boxes,
            flip=bool(config.flip),
            scale_jitter=jitter,
            group_of=config.group_of,
            on_image_error=config.on_image_error,
            num_threads=config.num_threads,
            prefetch=config.prefetch,
            max_proposals=max_proposals,
        )


class ExampleLoader:
    """Makes examples of slots; threads may share it.

    Attributes:
      photo_errors: counts the unreadable photos that were left out.
      dropped_boxes: how many boxes did not fit into `max_boxes`.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: Settings,
        proposals: TableBoxes | None = None,
        *,
        ground_truth: bool = True,
    ):
        """`ground_truth`: whether examples have the fields of training."""
        self.photo_errors = PhotoErrors(settings.on_image_error)
        self.dropped_boxes = 0
        self._lock = threading.Lock()
        self._dataset = dataset
        self._settings = settings
        self._proposals = proposals
        self._ground_truth = ground_truth
        self._fields = self._all_fields()

    def _all_fields(self) -> Fields:
        boxes, proposals = self._settings.max_boxes, self._settings.max_proposals
        fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "image": ((*self._settings.shape, 3), np.uint8),
            "image_size": ((2,), np.float32),
            "original_size": ((2,), np.int32),
            "image_index": ((), np.int32),
            "image_valid": ((), np.bool_),
        }
        if self._ground_truth:
            fields |= {
                "gt_boxes": ((boxes, 4), np.float32),
                "gt_classes": ((boxes,), np.int32),
                "gt_group_of": ((boxes,), np.bool_),
                "gt_valid": ((boxes,), np.bool_),
                "drawn_class": ((), np.int32),
            }
        if proposals:
            fields |= {
                "proposals": ((proposals, 4), np.float32),
                "proposal_valid": ((proposals,), np.bool_),
            }
        return fields

    def fields(self, slot: Slot) -> Fields:
        """Shape and type of each field of an example."""
        return self._fields

    def load(self, slot: Slot, example: Example) -> None:
        """Writes the example of a slot; leaves it empty when the photo is broken and may be
        skipped.

        Raises:
          UserError: the photo cannot be read and the config says 'fatal', or most cannot.
        """
        example["image_index"][()] = slot.index
        if self._ground_truth:
            example["drawn_class"][()] = slot.drawn_class
        # Before anything is known of the photo, so that they depend on the slot alone.
        scale, top, left, coin = slot.rng.random(4)
        if slot.index < 0:
            return
        self.photo_errors.count()
        low, high = self._settings.scale_jitter
        try:
            photo = self._open(slot.index)
            geometry = images.fit(
                photo.size,
                self._settings.canvas,
                scale=low + (high - low) * scale,
                crop=(top, left),
                flip=self._settings.flip and coin < 0.5,
            )
            content = images.draw_content(photo, geometry)
        except images.ImageError as error:
            self.photo_errors.skip(self._dataset.image_file(slot.index), error)
            return
        height, width = geometry.content
        example["image"][:height, :width] = content
        example["image_size"][:] = geometry.content
        example["original_size"][:] = photo.size
        example["image_valid"][()] = True
        if self._ground_truth:
            self._add_boxes(example, slot, geometry)
        if self._proposals is not None:
            self._add_proposals(example, slot, geometry, self._proposals)

    def _open(self, index: int) -> images.Photo:
        data = images.read_file(self._dataset.image_file(index))
        return images.open_photo(data, tuple(self._dataset.image_sizes[index].tolist()))

    def _add_boxes(self, example: Example, slot: Slot, geometry: images.Geometry) -> None:
        boxes, classes, flags = self._dataset.image_boxes(slot.index)
        boxes, keep = images.transform_boxes(boxes, geometry)
        group_of = flags & GROUP_OF > 0
        if self._settings.group_of == "drop":
            keep &= ~group_of
        rows = np.flatnonzero(keep)
        if len(rows) > self._settings.max_boxes:
            rows = self._subset(rows, classes[rows] == slot.drawn_class, slot)
        count = len(rows)
        example["gt_boxes"][:count] = boxes[rows]
        example["gt_classes"][:count] = classes[rows]
        example["gt_group_of"][:count] = group_of[rows]
        example["gt_valid"][:count] = True

    def _add_proposals(
        self, example: Example, slot: Slot, geometry: images.Geometry, table: TableBoxes
    ) -> None:
        first = slot.first_proposal
        boxes = table.image_boxes(slot.index)[first : first + len(example["proposals"])]
        # In the order of the table, so that what becomes of them can be put beside its rows.
        boxes, keep = images.transform_boxes(boxes, geometry)
        example["proposals"][: len(boxes)] = boxes
        example["proposal_valid"][: len(boxes)] = keep

    def _subset(
        self, rows: Int64[np.ndarray, " n"], drawn: Bool[np.ndarray, " n"], slot: Slot
    ) -> Int64[np.ndarray, " M"]:
        """A random subset in file order, with a box of the class that the image was drawn for."""
        limit = self._settings.max_boxes
        priority = slot.rng.random(len(rows))
        if drawn.any():
            priority[np.flatnonzero(drawn)[np.argmin(priority[drawn])]] = -1.0
        with self._lock:
            first = self.dropped_boxes == 0
            self.dropped_boxes += len(rows) - limit
        if first:
            _tell(
                f"{self._dataset.image_file(slot.index)}: {len(rows)} boxes, a random "
                f"{limit} of them are used (data.max_boxes); further such images are not printed"
            )
        return rows[np.sort(np.argsort(priority, kind="stable")[:limit])]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
