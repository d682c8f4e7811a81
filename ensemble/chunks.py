"""Reads the tables of an ensemble side by side, in chunks of whole images.

Shape legend: K classes, n rows of a chunk (all tables).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int32, Int64

from common.tables import Detections
from ensemble.inputs import Table, Tables

_MIN_ROWS = 1 << 12  # of one table in a chunk


@dataclasses.dataclass(frozen=True)
class Chunk:
    """All rows of the images [first, stop), sorted by table, then image, then score descending.

    Attributes:
      first: of the images of this chunk.
      stop: end of the images of this chunk; images without rows count too.
      images: (n,) image index.
      labels: (n,) class index.
      scores: (n,) as in the tables.
      boxes: (n, 4) normalised.
      models: (n,) place of the table among the inputs.
      masks: (n,) COCO RLE counts, or None.
      mask_sizes: (n, 2) height and width, or None.
    """

    first: int
    stop: int
    images: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    models: Int32[np.ndarray, " n"]
    masks: np.ndarray | None = None
    mask_sizes: Int32[np.ndarray, "n 2"] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def groups(self, num_classes: int) -> Int64[np.ndarray, " n"]:
        """One key for each (image, class): image * K + class."""
        return self.images.astype(np.int64) * num_classes + self.labels


def aligned_chunks(
    tables: Tables,
    *,
    rows: int = 1 << 19,
    images: range | None = None,
    masks: bool = False,
    refuse_duplicates: bool = True,
) -> Iterator[Chunk]:
    """Yields the rows of all tables in chunks of whole images, in image order.

    Memory holds a few times `rows` rows (of 32 bytes, without masks) whatever the number of tables
    and images, plus a few megabytes of buffers for each table.

    Args:
      tables: opened.
      rows: about how many rows, of all tables together, a chunk has (at least 4096 of each table
        are read at a time).
      images: image indices to read (default: all). Every one of them is in exactly one chunk,
        with rows or without.
      masks: read masks too.
      refuse_duplicates: equal rows of one table are an error.

    Raises:
      UserError: a row that breaks the contract; the text names file and row.
    """
    images = range(len(tables.image_ids)) if images is None else images
    share = max(rows // len(tables.tables), _MIN_ROWS)
    streams = [
        _Pending(place, table, share, images, masks, refuse_duplicates)
        for place, table in enumerate(tables.tables)
    ]
    first = images.start
    while first < images.stop:
        stop = min(stream.complete() for stream in streams)
        parts = [stream.pop(stop) for stream in streams]
        names = [field.name for field in dataclasses.fields(Chunk)[2:]]
        yield Chunk(
            first,
            stop,
            **{
                name: np.concatenate([part[name] for part in parts])
                for name in names
                if name in parts[0]
            },
        )
        first = stop


class _Pending:
    """Rows of one table that were read but not yet passed on, with indices of the ensemble."""

    def __init__(
        self,
        model: int,
        table: Table,
        rows: int,
        images: range,
        masks: bool,
        refuse_duplicates: bool,
    ):
        self._model, self._table, self._masks = model, table, masks
        self._share, self._stop = rows, images.stop
        own = images
        if table.image_codes is not None:
            inside = np.flatnonzero(
                (table.image_codes >= images.start) & (table.image_codes < images.stop)
            )
            own = range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)
        self._chunks = table.reader.chunks(
            table.source_labels,
            masks=masks,
            rows=rows,
            images=own,
            refuse_duplicates=refuse_duplicates,
        )
        self._rows = self._convert(_no_rows())
        self._finished = False

    def complete(self) -> int:
        """Reads until a share of rows is pending; returns the end of the images that are whole."""
        while not self._finished and len(self._rows["images"]) < self._share:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._finished = True
            else:
                new = self._convert(chunk)
                self._rows = {n: np.concatenate([self._rows[n], new[n]]) for n in new}
        return self._stop if self._finished else int(self._rows["images"][-1]) + 1

    def pop(self, stop: int) -> dict[str, np.ndarray]:
        """Removes and returns the rows of images before `stop`."""
        rows, cut = self._rows, int(np.searchsorted(self._rows["images"], stop))
        self._rows = {name: array[cut:] for name, array in rows.items()}
        return {name: array[:cut] for name, array in rows.items()}

    def _convert(self, detections: Detections) -> dict[str, np.ndarray]:
        images, targets = detections.image_index, self._table.label_codes[detections.label_index]
        if self._table.image_codes is not None:
            images = self._table.image_codes[images]
        rows = dict(images=images, scores=detections.scores, boxes=detections.boxes)
        if self._masks and detections.masks is not None and detections.mask_sizes is not None:
            rows.update(masks=detections.masks, mask_sizes=detections.mask_sizes)
        kept = (images >= 0)[:, None] & (targets >= 0)
        labels = targets[:, 0]
        if targets.shape[1] > 1 or not kept.all():
            source, column = np.nonzero(kept)
            rows = {name: array[source] for name, array in rows.items()}
            labels = targets[source, column]
        models = np.full(len(labels), self._model, np.int32)
        return rows | {"labels": labels, "models": models}


def _no_rows() -> Detections:
    none = np.zeros(0, np.int32)
    return Detections(
        image_ids=[],
        labels=[],
        image_index=none,
        label_index=none,
        scores=np.zeros(0, np.float32),
        boxes=np.zeros((0, 4), np.float32),
        metadata={},
        masks=np.zeros(0, object),
        mask_sizes=np.zeros((0, 2), np.int32),
    )
