"""Boxes of a detections table by image of a dataset, in any order of images.

Shape legend: N images of the dataset, I of the table; n boxes of one image; s pieces.
"""

import tempfile

import numpy as np
from jaxtyping import Float32, Int, Int64

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.tables import DetectionsReader

_NO_BOXES = np.zeros((0, 4), np.float32)


class TableBoxes:
    """The boxes of a detections table, best first within an image; labels do not matter.

    The table is read once. Its boxes go to an unnamed temporary file that is mapped: page cache,
    not heap.

    Attributes:
      images: dataset index of each image of the table, in table order.
      counts: number of boxes of each of them; 0 outside the part that was read.
    """

    images: Int64[np.ndarray, " I"]
    counts: Int64[np.ndarray, " I"]

    def __init__(self, reader: DetectionsReader, dataset: Dataset, part: range | None = None):
        """Reads a table.

        Args:
          reader: of the table.
          dataset: that its images belong to.
          part: places in `reader.image_ids` whose boxes are wanted; all by default.

        Raises:
          UserError: an image that the dataset has not, a broken row, or no room for the boxes.
        """
        self.images = dataset.find_images(reader.image_ids)
        if (self.images < 0).any():
            place = int(np.argmax(self.images < 0))
            raise UserError(
                f"{reader.path}: image {reader.image_ids[place]!r} is not in {dataset.directory}, "
                "expected a table of its images"
            )
        self.counts = np.zeros(len(self.images), np.int64)
        try:
            with tempfile.TemporaryFile() as spool:
                for chunk in reader.chunks(images=part):
                    first = int(chunk.image_index[0])
                    found = np.bincount(chunk.image_index - first)
                    self.counts[first : first + len(found)] += found
                    spool.write(np.ascontiguousarray(chunk.boxes, np.float32).data)
                spool.flush()
                total = int(self.counts.sum())
                self._boxes = _NO_BOXES
                if total:
                    self._boxes = np.memmap(spool, np.float32, "r", shape=(total, 4))
        except OSError as error:
            raise UserError(
                f"{reader.path}: cannot keep its boxes in {tempfile.gettempdir()} ({error}); the "
                "variable TMPDIR names another folder"
            ) from error
        self._ends = np.cumsum(self.counts)
        self._place = np.full(dataset.num_images, -1, np.int32)
        self._place[self.images] = np.arange(len(self.images))

    def image_boxes(self, index: int) -> Float32[np.ndarray, "n 4"]:
        """Normalised boxes of an image of the dataset; none where the table does not cover it."""
        place = self._place[index]
        if place < 0:
            return _NO_BOXES
        end = self._ends[place]
        return self._boxes[end - self.counts[place] : end]

    def pieces(
        self, places: range, size: int
    ) -> tuple[Int64[np.ndarray, " s"], Int64[np.ndarray, " s"], Int64[np.ndarray, " s"]]:
        """Cuts the boxes of the images at `places` into pieces of an image, in table order.

        Returns:
          image of the dataset, first box within the image, and number of boxes, `size` at most.
        """
        counts = self.counts[places.start : places.stop]
        parts = -(-counts // size)
        image = np.repeat(np.arange(len(counts)), parts)
        first = (np.arange(len(image)) - np.repeat(np.cumsum(parts) - parts, parts)) * size
        return self.images[places.start + image], first, np.minimum(counts[image] - first, size)

    def num_covered(self, images: Int[np.ndarray, " n"]) -> int:
        """How many of these images of the dataset the table covers."""
        return int((self._place[images] >= 0).sum())
