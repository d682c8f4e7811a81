"""Rows of tables on their way out: whole images, scores and masks as servers take them.

Shape legend: n rows, i covered images.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool

from common.io.errors import UserError
from common.io.progress import Progress
from common.masks import rle
from common.tables import Detections, DetectionsReader
from common.tables.table import MAX_SCORE, rank_in_image

SCORES = ("clip", "scale", "keep")
_CHUNK = 1 << 17  # rows


@dataclasses.dataclass
class Outgoing:
    """Chunks of a table as they are to be written.

    Attributes:
      reader: the table.
      selected: (i,) covered images to write; None = all.
      class_labels: labels of the dataset, which `label_index` points into; None = as they come.
      masks: whether to read the masks.
      scores: what becomes of scores above 1: 'clip' sets them to 1, 'scale' divides all scores by
        MAX_SCORE so that their order stays, 'keep' leaves them.
      max_per_image: rows written per image, best first; None = all.
      written: rows passed on so far.
      clipped: scores that were set to 1 so far.
      cut: rows left out by `max_per_image` so far.
    """

    reader: DetectionsReader
    selected: Bool[np.ndarray, " i"] | None = None
    class_labels: list[str] | None = None
    masks: bool = False
    scores: str = "clip"
    max_per_image: int | None = None
    written: int = 0
    clipped: int = 0
    cut: int = 0

    def chunks(self) -> Iterator[Detections]:
        """Pieces of whole images, in table order.

        Raises:
          UserError: a broken table, an unknown label, or a mask that is none.
        """
        name = os.path.basename(self.reader.path)
        progress = Progress(self.reader.num_rows, what=name, unit="rows")
        read = 0
        for chunk in self.reader.chunks(self.class_labels, masks=self.masks, rows=_CHUNK):
            read += len(chunk)
            progress.report(read)
            if self.selected is not None:
                chunk = chunk.take(self.selected[chunk.image_index])
            if self.masks:
                self._check_masks(chunk)
            if self.max_per_image is not None:
                top = rank_in_image(chunk.image_index) < self.max_per_image
                self.cut += int((~top).sum())
                chunk = chunk.take(top)
            if not len(chunk):
                continue
            scores = chunk.scores
            if self.scores == "clip":
                self.clipped += int((scores > 1).sum())
                scores = np.minimum(scores, 1)
            elif self.scores == "scale":
                scores = (scores / np.float32(MAX_SCORE)).astype(np.float32)
            self.written += len(chunk)
            yield dataclasses.replace(chunk, scores=scores)

    def _check_masks(self, chunk: Detections) -> None:
        broken = rle.find_broken(*chunk.mask_columns())
        if broken is not None:
            image = chunk.image_ids[chunk.image_index[broken[0]]]
            rank = rank_in_image(chunk.image_index)[broken[0]]
            raise UserError(
                f"{self.reader.path}: image {image!r}, detection {rank} of it: {broken[1]}"
            )

    def tell(self, say: Callable[[str], None]) -> None:
        """Says what was changed."""
        if self.clipped:
            say(
                f"note: {self.clipped} scores above 1 are written as 1 and lose their order; "
                "--scores=scale keeps it"
            )
        if self.cut:
            say(f"note: {self.cut} detections beyond {self.max_per_image} per image are left out")
