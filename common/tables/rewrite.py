"""Detections tables made of other ones, image by image."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from common.io.paths import PathLike
from common.tables.reader import DetectionsReader
from common.tables.table import Detections
from common.tables.writer import DetectionsWriter


def rewrite_table(
    reader: DetectionsReader,
    output: PathLike,
    metadata: Mapping[str, Any],
    change: Callable[[Detections], Detections],
    *,
    labels: Sequence[str] | None = None,
    image_ids: Collection[str] | None = None,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Writes a table of changed rows; images without rows stay covered.

    Args:
      reader: of the table.
      output: file to write.
      metadata: of the new table.
      change: called with rows of whole images in table order, gives rows in table order.
      labels: what `label_index` points into in the rows that `change` gets.
      finish: called before the table is completed; an error here leaves no table.
      image_ids: images that the new table covers, of those of the old one; None = all.

    Returns:
      The number of rows written.

    Raises:
      UserError: a broken table, or what `change` raises.
    """
    has_masks, written = reader.has_masks, 0
    left = set(reader.image_ids if image_ids is None else image_ids)
    with DetectionsWriter(output, dict(metadata), masks=has_masks) as writer:
        for chunk in reader.chunks(labels, masks=has_masks):
            changed = change(chunk)
            names = np.array(changed.labels, object)
            for rows in changed.chunks(rows=1):
                image_id = reader.image_ids[rows.image_index[0]]
                if image_id in left:
                    left.remove(image_id)
                    row_labels = names[rows.label_index]
                    writer.add(
                        image_id, row_labels, rows.scores, rows.boxes, rows.masks, rows.mask_sizes
                    )
                    written += len(rows)
        for image_id in sorted(left):
            writer.add_empty(image_id)
        finish()
    return written
