"""One slot of a batch: photo and annotations on the canvas, augmented. NumPy and Pillow only.

Shape legend: H, W canvas; M = max_boxes; G = max_ignore; P = max_proposals; K classes of the run;
b boxes of an image, n of them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from numpy.typing import DTypeLike

from common.data import images, placement
from common.data.augmentation import NUM_DRAWS, ElaborateAugmentation
from common.data.batches import Example, Fields
from common.data.canvases import Canvas
from common.data.dataset_format import CROWD, GROUP_OF
from common.data.labels import VerifiedLabels
from common.data.object_masks import ObjectMasks
from common.data.photo_errors import PhotoErrors
from common.data.proposals import TableBoxes
from common.data.settings import DataSettings
from common.data.sources import Source
from common.data.workers.sinks import Tally


@dataclasses.dataclass(frozen=True)
class Slot:
    """What is to be put into one place of a batch.

    Attributes:
      canvas: height, width, not padded.
      index: image index in the dataset of its source, -1 for padding.
      drawn_class: class the image was drawn for, -1: none.
      rng: random numbers of this slot; None: no augmentation.
      source: place of its source among those of the run.
      first_proposal: the first of the image's proposals that this slot has.
    """

    canvas: Canvas
    index: int
    drawn_class: int = -1
    rng: np.random.Generator | None = None
    source: int = 0
    first_proposal: int = 0


class PhotoLoader:
    """Makes examples without ground truth: what inference needs. Threads may share it.

    Attributes:
      photo_errors: counts the unreadable photos that were left out.
    """

    _num_draws = 4  # random numbers of a photo: scale, top, left, mirror

    def __init__(
        self, sources: Sequence[Source], settings: DataSettings, proposals: TableBoxes | None = None
    ):
        self.photo_errors = PhotoErrors(settings.on_image_error)
        self._sources = sources
        self._settings = settings
        self._proposals = proposals

    def fields(self, slot: Slot) -> Fields:
        """Shape and type of each field of an example."""
        shape = images.canvas_shape(slot.canvas, self._settings.pad_multiple)
        fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "image": ((*shape, 3), np.uint8),
            "image_size": ((2,), np.float32),
            "original_size": ((2,), np.int32),
            "image_index": ((), np.int32),
            "image_valid": ((), np.bool_),
        }
        if self._settings.max_proposals:
            count = self._settings.max_proposals
            fields["proposals"] = ((count, 4), np.float32)
            fields["proposal_valid"] = ((count,), np.bool_)
        return fields

    def load(self, slot: Slot, example: Example) -> None:
        """Writes the example of a slot; leaves it empty when the photo is broken and may be
        skipped.

        Raises:
          UserError: the photo cannot be read and the config says 'fatal', or most cannot.
        """
        source = self._sources[slot.source]
        example["image_index"][()] = slot.index + source.first_index if slot.index >= 0 else -1
        # Before anything is known of the photo, so that they depend on the slot alone.
        draws = [] if slot.rng is None else slot.rng.random(self._num_draws).tolist()
        if slot.index < 0:
            return
        self.photo_errors.count()
        path = source.dataset.image_file(slot.index)
        try:
            photo = self._open(path, source.dataset.image_sizes[slot.index].tolist())
            geometry = self._fit(photo.size, slot, draws)
            content = self._draw(photo, geometry)
        except images.ImageError as error:
            self.photo_errors.skip(path, error)
            return
        height, width = geometry.content
        example["image"][:height, :width] = content
        example["image_size"][:] = geometry.content
        example["original_size"][:] = photo.size
        example["image_valid"][()] = True
        self._annotate(example, slot, geometry)

    def _open(self, path: str, annotated_size: tuple[int, int]) -> images.Photo:
        return images.open_photo(images.read_file(path), annotated_size)

    def _draw(
        self, photo: images.Photo, geometry: placement.Geometry
    ) -> UInt8[np.ndarray, "h w 3"]:
        return placement.draw_content(photo, geometry)

    def _fit(self, size: tuple[int, int], slot: Slot, draws: Sequence[float]) -> placement.Geometry:
        if slot.rng is None:
            return placement.fit(size, slot.canvas)
        scale, top, left, coin = draws
        low, high = self._settings.scale_jitter
        return placement.fit(
            size,
            slot.canvas,
            scale=low + (high - low) * scale,
            crop=(top, left),
            flip=self._settings.flip and coin < 0.5,
        )

    def _annotate(self, example: Example, slot: Slot, geometry: placement.Geometry) -> None:
        """Writes what belongs to the photo: proposals."""
        if self._proposals is None:
            return
        first, count = slot.first_proposal, self._settings.max_proposals
        boxes = self._proposals.image_boxes(slot.index)[first : first + count]
        # In the order of the table, so that what becomes of them can be put beside its rows.
        boxes, keep = placement.transform_boxes(boxes, geometry)
        example["proposals"][: len(boxes)] = boxes
        example["proposal_valid"][: len(boxes)] = keep


class TrainingLoader(PhotoLoader):
    """Makes examples with everything that is known of a photo.

    Attributes:
      dropped_boxes: counts the boxes that did not fit into `max_boxes`.
      dropped_ignore_boxes: counts those that did not fit into `max_ignore`.
      masks: of the objects; None where the run has none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: DataSettings,
        proposals: TableBoxes | None = None,
        labels: VerifiedLabels | None = None,
        augmentation: ElaborateAugmentation | None = None,
    ):
        """`labels`: of `data.image_labels`; `augmentation`: of `data.elaborate`."""
        super().__init__(sources, settings, proposals)
        self.dropped_boxes, self.dropped_ignore_boxes = Tally(), Tally()
        self._labels, self._augmentation = labels, augmentation
        if augmentation is not None:
            self._num_draws = NUM_DRAWS
        size, on_error = settings.mask_size, settings.on_image_error
        self.masks = ObjectMasks(sources, size, on_error) if size else None

    def fields(self, slot: Slot) -> Fields:
        """Shape and type of each field of an example."""
        boxes, ignored = self._settings.max_boxes, self._settings.max_ignore
        fields = dict(super().fields(slot)) | {
            "gt_boxes": ((boxes, 4), np.float32),
            "gt_classes": ((boxes,), np.int32),
            "gt_group_of": ((boxes,), np.bool_),
            "gt_valid": ((boxes,), np.bool_),
            "ignore_boxes": ((ignored, 4), np.float32),
            "ignore_valid": ((ignored,), np.bool_),
            "drawn_class": ((), np.int32),
        }
        if self.masks is not None:
            fields |= self.masks.fields(boxes)
        num_classes = self._sources[0].num_classes
        if self._labels is not None:
            fields["labels"] = ((num_classes,), np.int8)
        if self._settings.some_unknown:
            fields["class_known"] = ((num_classes,), np.bool_)
        if len(self._sources) > 1:
            fields["source"] = ((), np.int32)
        return fields

    def load(self, slot: Slot, example: Example) -> None:
        """As `PhotoLoader.load`."""
        example["drawn_class"][()] = slot.drawn_class
        if self._settings.some_unknown:
            example["class_known"][:] = self._sources[slot.source].known
        if len(self._sources) > 1:
            example["source"][()] = slot.source
        super().load(slot, example)

    def _fit(self, size: tuple[int, int], slot: Slot, draws: Sequence[float]) -> placement.Geometry:
        if self._augmentation is None or slot.rng is None:
            return super()._fit(size, slot, draws)
        source = self._sources[slot.source]
        return self._augmentation.geometry(
            size, slot.canvas, source, slot.index, slot.drawn_class, draws
        )

    def _annotate(self, example: Example, slot: Slot, geometry: placement.Geometry) -> None:
        super()._annotate(example, slot, geometry)
        source, visible = self._sources[slot.source], None
        if source.has_boxes:
            visible, ignored = self._add_boxes(example, slot, source, geometry)
        else:  # nothing of the photo is known to be background
            ignored = np.array([[0, 0, *geometry.content[::-1]]], np.float32)
        self._add_ignore_boxes(example, ignored, slot, source)
        if self._labels is not None:
            example["labels"][:] = self._labels.of_image(
                source, slot.index, visible, cropped=geometry.is_cropped
            )

    def _add_boxes(
        self, example: Example, slot: Slot, source: Source, geometry: placement.Geometry
    ) -> tuple[Bool[np.ndarray, " b"], Float32[np.ndarray, "n 4"]]:
        """Writes the objects.

        Returns:
          which boxes of the photo are visible, and the ignore boxes, some without area.
        """
        annotated, classes, flags = source.dataset.image_boxes(slot.index)
        ellipse = self._settings.elaborate.boxes == "ellipse"
        boxes, visible = placement.transform_boxes(annotated, geometry, ellipse=ellipse)
        classes = source.classes[classes]
        group_of = flags & GROUP_OF > 0
        crowd = flags & CROWD > 0
        # An object that the run has no class for is no background either.
        ignored = crowd | (classes < 0)
        no_object = ignored
        if self._settings.group_of == "ignore":
            no_object = ignored = ignored | group_of
        elif self._settings.group_of == "drop":
            no_object = ignored | group_of
        rows = np.flatnonzero(visible & ~no_object)
        if len(rows) > self._settings.max_boxes:
            chosen = self._subset(rows, classes[rows] == slot.drawn_class, slot, source)
            ignored = ignored.copy()
            ignored[np.setdiff1d(rows, chosen, assume_unique=True)] = True
            rows = chosen
        count = len(rows)
        example["gt_boxes"][:count] = boxes[rows]
        example["gt_classes"][:count] = classes[rows]
        example["gt_group_of"][:count] = group_of[rows]
        example["gt_valid"][:count] = True
        if self.masks is not None:
            height, width = example["original_size"].tolist()
            self.masks.write(
                example, source, slot.index, rows, boxes[rows], (height, width), geometry
            )
        # What is left of a cut object is no background either: a crop may lie inside it.
        ignored = ignored | (~visible & ~no_object)
        regions = source.dataset.image_ignore_boxes(slot.index)
        # Hulls, turned or not: nothing that a region may hold is outside.
        regions = np.concatenate([annotated[ignored], regions])
        return visible, placement.transform_boxes(regions, geometry)[0]

    def _add_ignore_boxes(
        self, example: Example, boxes: Float32[np.ndarray, "n 4"], slot: Slot, source: Source
    ) -> None:
        limit = self._settings.max_ignore
        sides = boxes[:, 2:] - boxes[:, :2]
        boxes, areas = boxes[(sides > 0).all(axis=1)], sides[(sides > 0).all(axis=1)].prod(axis=1)
        if len(boxes) > limit:
            self.dropped_ignore_boxes.add(
                len(boxes) - limit,
                f"{source.dataset.image_file(slot.index)}: {len(boxes)} ignore boxes, the largest "
                f"{limit} are used (data.max_ignore)",
            )
            boxes = boxes[np.sort(np.argsort(-areas, kind="stable")[:limit])]
        example["ignore_boxes"][: len(boxes)] = boxes
        example["ignore_valid"][: len(boxes)] = True

    def _subset(
        self,
        rows: Int64[np.ndarray, " n"],
        drawn: Bool[np.ndarray, " n"],
        slot: Slot,
        source: Source,
    ) -> Int64[np.ndarray, " M"]:
        """A random subset in file order, with a box of the class that the image was drawn for."""
        assert slot.rng is not None
        limit = self._settings.max_boxes
        priority = slot.rng.random(len(rows))
        if drawn.any():
            priority[np.flatnonzero(drawn)[np.argmin(priority[drawn])]] = -1.0
        self.dropped_boxes.add(
            len(rows) - limit,
            f"{source.dataset.image_file(slot.index)}: {len(rows)} boxes, a random {limit} of them "
            "are objects and the others are ignored (data.max_boxes)",
        )
        return rows[np.sort(np.argsort(priority, kind="stable")[:limit])]
