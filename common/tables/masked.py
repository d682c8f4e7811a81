"""Detections tables whose rows get masks.

Shape legend: n rows of a part of the table.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from common.tables.reader import DetectionsReader
from common.tables.table import Detections
from common.tables.writer import DetectionsWriter

_ROWS = 1 << 17  # of the table in memory at once, with their masks


class RowMasks(NamedTuple):
    """Masks of some rows of a part of a table.

    Attributes:
      rows: (n,) of the part.
      counts: (n,) compressed counts of each.
      sizes: (n, 2) height and width.
    """

    rows: Int[np.ndarray, " n"]
    counts: Sequence[bytes]
    sizes: Int[np.ndarray, "n 2"]


def write_with_masks(
    reader: DetectionsReader,
    writer: DetectionsWriter,
    images: range,
    labels: Sequence[str] | None,
    outline: Callable[[Detections], Iterable[RowMasks]],
) -> None:
    """Writes the rows of some images of a table again, with masks.

    Args:
      reader: of the table.
      writer: of the new one.
      images: places in `reader.image_ids`; those without rows are covered, too.
      labels: what `label_index` points into in the parts that `outline` gets; None: any labels.
      outline: called with a part of whole images, gives the masks of all of its rows in any order.
    """
    written = images.start
    for part in reader.chunks(labels, images=images, rows=_ROWS):
        masks, sizes = np.empty(len(part), object), np.zeros((len(part), 2), np.int32)
        for rows, counts, row_sizes in outline(part):
            masks[rows], sizes[rows] = counts, row_sizes
        last = int(part.image_index[-1]) + 1
        _write(writer, part, range(written, last), masks, sizes)
        written = last
    for image in range(written, images.stop):
        writer.add_empty(reader.image_ids[image])


def _write(
    writer: DetectionsWriter, part: Detections, images: range, masks: np.ndarray, sizes: np.ndarray
) -> None:
    labels = np.array(part.labels)
    bounds = np.searchsorted(part.image_index, np.arange(images.start, images.stop + 1))
    for image, start, stop in zip(images, bounds[:-1], bounds[1:], strict=True):
        rows = slice(start, stop)
        writer.add(
            part.image_ids[image],
            labels[part.label_index[rows]],
            part.scores[rows],
            part.boxes[rows],
            list(masks[rows]),
            sizes[rows],
        )
