"""The masks of a COCO file as they are kept: what cannot be drawn is left out and listed.

Shape legend: m annotations of the file, N images.
"""

import json
from array import array
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int32

from common.masks import rle
from common.masks.dataset_masks import same_shape

FEW_POINTS = "polygon with fewer than 3 points"
EMPTY = "empty mask"
OTHER_SHAPE = "mask of another shape than its photo"

_EMPTY_LENGTH = 8  # compressed counts of an empty mask are one number, of at most seven characters


class MaskSpool:
    """Writes masks into a file as JSON texts, and remembers where.

    Attributes:
      start: (m) where the text of a mask begins.
      length: (m) its length, 0 = no mask.
      repairs: reason -> ids of the annotations.
    """

    def __init__(self, file: IO[bytes]):
        self.start, self.length = array("q"), array("i")
        self.repairs: dict[str, list[int]] = {}
        self._file = file
        self._frames = array("i")  # height and width of run lengths, 0 of the others

    def add(self, mask: Any, row: int) -> None:
        """Adds the `segmentation` of the next annotation.

        Args:
          mask: polygons, run lengths, or nothing.
          row: id of the annotation.

        Raises:
          ValueError, TypeError: it is neither.
        """
        frame = (0, 0)
        mask = None if mask in ("", {}) else mask
        if isinstance(mask, list):
            mask = self._polygons(mask, row)
        elif isinstance(mask, dict):
            if not {"size", "counts"} <= mask.keys():
                raise ValueError(f"segmentation with {', '.join(mask)}, expected size and counts")
            height, width = (int(side) for side in mask["size"])
            frame = (height, width)
            if _is_empty(mask["counts"], frame):
                mask = []
        elif mask is not None:
            raise ValueError(f"segmentation {mask!r}, expected polygons or size and counts")
        text = json.dumps(mask, separators=(",", ":")).encode() if mask else b""
        if mask is not None and not text:
            self.repairs.setdefault(EMPTY, []).append(row)
        self.start.append(self._file.tell() if text else 0)
        self.length.append(len(text))
        self._frames.extend(frame if text else (0, 0))
        self._file.write(text)

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
            wrong[place] = frames[place].min() < 1 or not same_shape(frames[place], sizes[place])
        if wrong.any():
            self.repairs[OTHER_SHAPE] = rows[wrong].tolist()
        return wrong

    def _polygons(self, parts: list[Any], row: int) -> list[list[float]]:
        """The parts that can be drawn."""
        if parts and all(isinstance(value, int | float) for value in parts):
            parts = [parts]  # one polygon without a list around it
        if not all(isinstance(part, list) for part in parts):
            raise ValueError(f"segmentation {str(parts)[:60]}, expected lists of coordinates")
        whole = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0]
        if len(whole) < len(parts):
            self.repairs.setdefault(FEW_POINTS, []).append(row)
        return whole


def _is_empty(counts: Any, frame: tuple[int, int]) -> bool:
    """Whether run lengths have no foreground; broken ones are told of when they are read."""
    if isinstance(counts, list):
        return not any(counts[1::2])
    text = str(counts).encode()
    if len(text) > _EMPTY_LENGTH or rle.find_broken([text], np.array([frame])) is not None:
        return False
    return not rle.areas([text])[0]
