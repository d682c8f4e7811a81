"""The masks of a COCO file as they are kept: what cannot be drawn is left out and listed.

Shape legend: m annotations of the file.
"""

import json
import zlib
from array import array
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int32

from common.convert.segments import clean_segmentation
from common.masks.dataset_masks import same_shape

OTHER_SHAPE = "mask of another shape than its photo"


class MaskSpool:
    """Writes masks into a file as JSON texts, and remembers where.

    Attributes:
      start: (m) where the text of a mask begins.
      length: (m) its length, 0 = no mask.
      check: (m) checksum of the text.
      repairs: reason -> ids of the annotations.
    """

    def __init__(self, file: IO[bytes]):
        self.start, self.length, self.check = array("q"), array("i"), array("I")
        self.repairs: dict[str, list[int]] = {}
        self._file = file
        self._frames = array("i")  # height and width of run lengths, 0 of the others

    def add(self, segmentation: Any, row: int, size: tuple[int, int]) -> Any:
        """Adds the mask of the next annotation, and returns what is kept of it.

        Args:
          segmentation: polygons, run lengths, or nothing.
          row: id of the annotation.
          size: height and width of the photo, 0 = unknown.

        Raises:
          ValueError, TypeError: it is neither.
        """
        mask, wrong = clean_segmentation(segmentation, size)
        for reason in wrong:
            self.repairs.setdefault(reason, []).append(row)
        text = json.dumps(mask, separators=(",", ":")).encode() if mask else b""
        self.start.append(self._file.tell() if text else 0)
        self.length.append(len(text))
        self.check.append(zlib.crc32(text))
        self._frames.extend(mask["size"] if isinstance(mask, dict) else (0, 0))
        self._file.write(text)
        return mask

    def drop_other_shapes(
        self, sizes: Int32[np.ndarray, "m 2"], rows: np.ndarray
    ) -> Bool[np.ndarray, " m"]:
        """Forgets run lengths that cannot be those of their photos; says which they are.

        Args:
          sizes: height and width of the photo of each annotation.
          rows: their ids.
        """
        frames = np.frombuffer(self._frames, np.int32).reshape(-1, 2)
        wrong = np.zeros(len(frames), bool)
        known = sizes.all(1)
        # Frames are mostly those of the photos: only the others are looked at one by one.
        odd = (frames != sizes).any(1) & frames.any(1) & known
        for place in np.flatnonzero(odd):
            wrong[place] = not same_shape(frames[place], sizes[place])
        if wrong.any():
            self.repairs[OTHER_SHAPE] = rows[wrong].tolist()
        return wrong
