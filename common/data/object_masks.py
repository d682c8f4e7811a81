"""Masks of the objects of a photo, each cropped to its box as the canvas shows it.

Shape legend: n objects of a slot, M = max_boxes, S = mask_size.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from common.data.batches import Example, Fields
from common.data.photo_errors import PhotoErrors
from common.data.placement import Geometry
from common.data.sources import Source
from common.masks.dataset_masks import MaskError, MaskReader


class ObjectMasks:
    """Writes `gt_masks` and `gt_has_mask` of examples. Threads may share it.

    Attributes:
      errors: counts the masks that were left out because they cannot be read.
    """

    def __init__(self, sources: Sequence[Source], size: int, on_image_error: str):
        """`size`: S, pixels, a multiple of 8."""
        self.errors = PhotoErrors(on_image_error)
        self._size = size
        self._readers = [MaskReader(s.dataset) if s.has_masks else None for s in sources]

    def fields(self, max_boxes: int) -> Fields:
        """Shape and type of the fields of an example."""
        return {
            "gt_masks": ((max_boxes, self._size, self._size // 8), np.uint8),
            "gt_has_mask": ((max_boxes,), np.bool_),
        }

    def write(
        self,
        example: Example,
        source: Source,
        image: int,
        rows: Int[np.ndarray, " n"],
        boxes: Float32[np.ndarray, "n 4"],
        photo_size: tuple[int, int],
        geometry: Geometry,
    ) -> None:
        """Writes the masks of the first n boxes of an example.

        A mask of which the box shows nothing counts as none: nothing is known to be outlined there.

        Args:
          example: arrays of zeros.
          source: of the photo.
          image: the photo, an index of the source's dataset.
          rows: of the objects among the boxes of the image.
          boxes: on the canvas, clipped to its content, with an area.
          photo_size: height, width of the photo as displayed.
          geometry: how the photo lies on the canvas.

        Raises:
          UserError: a mask cannot be read and the config says 'fatal', or most cannot.
        """
        reader = self._readers[source.place]
        if reader is None or not len(rows):
            return
        rows = np.asarray(rows, np.int64) + int(source.dataset.box_offsets[image])
        size = (self._size, self._size)
        for place in np.flatnonzero(reader.has_mask(rows)):
            self.errors.count()
            cut = geometry.cut(photo_size, boxes[place], size, enlarge_first=True)
            try:
                mask = cut.mask(reader.window(int(rows[place]), cut.area, cut.area_size))
            except MaskError as error:
                self.errors.skip(source.dataset.image_file(image), error, "mask")
                continue
            if not mask.any():
                continue
            example["gt_masks"][place] = np.packbits(mask, axis=1)
            example["gt_has_mask"][place] = True
