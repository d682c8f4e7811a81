"""Checked reading of detections tables (`common.tables` describes the format).

Shape legend: n detections.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from common.io.errors import UserError
from common.io.paths import PathLike, to_epath
from common.tables.table import Detections, shard_name
from common.tables.table_file import TableFile, concatenate

_MIN_BATCH = 1 << 10  # rows of a file read at once
_SHARD = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet")


class DetectionsReader:
    """An opened detections table (file or folder of shards); rows are checked as they are read."""

    def __init__(self, path: PathLike, like: "DetectionsReader | None" = None):
        """Opens the table and checks schema, metadata and that all shards are there.

        Args:
          path: file or folder, local or gs:// (each remote file is copied to the local disk once).
          like: reader of another table. When both cover the same images the two share the list of
            ids, so that many tables need the memory of one.

        Raises:
          UserError: no table there, or a broken one; the text names the file.
        """
        self.path = to_epath(path)
        self.files = [TableFile(file) for file in _table_files(self.path)]
        first = self.files[0]
        self.metadata = first.metadata
        self.has_masks = first.has_masks
        self.num_rows = sum(file.num_rows for file in self.files)
        owner: dict[str, epath.Path] = {}
        for file in self.files:
            if file.metadata != self.metadata or file.has_masks != self.has_masks:
                raise UserError(
                    f"{file.path}: metadata differ from {first.path.name}: shards of two exports "
                    "in one folder; export again into an empty folder"
                )
            for image_id in file.image_ids:
                if image_id in owner:
                    raise UserError(
                        f"{file.path}: image {image_id!r} is covered twice"
                        f" (also by {owner[image_id].name})"
                    )
                owner[image_id] = file.path
        self.image_ids = sorted(owner)
        self.image_codes: dict[str, int]
        if like is not None and like.image_ids == self.image_ids:
            self.image_ids, self.image_codes = like.image_ids, like.image_codes
            for file in self.files:
                codes = (self.image_codes[image_id] for image_id in file.image_ids)
                file.image_ids = [self.image_ids[code] for code in codes]
        else:
            self.image_codes = {image_id: code for code, image_id in enumerate(self.image_ids)}

    def chunks(
        self,
        class_labels: Sequence[str] | None = None,
        *,
        masks: bool = False,
        rows: int = 1 << 19,
        images: range | None = None,
        refuse_duplicates: bool = False,
    ) -> Iterator[Detections]:
        """Yields the rows in table order, over all shards, in pieces of whole images.

        Args:
          class_labels: labels that `label_index` shall point into; a label that is not among them
            is an error. None collects the labels as they come (later pieces may know more).
          masks: whether to read the mask columns.
          rows: about how many rows a piece has.
          images: places in `image_ids` (step 1) to read; row groups without any are skipped.
          refuse_duplicates: a row that equals an earlier one of its file is an error.

        Raises:
          UserError: a row that breaks the contract; the text names file and row.
        """
        if masks and not self.has_masks:
            raise UserError(f"{self.path}: no mask column, expected a table with masks")
        labels = list(class_labels) if class_labels is not None else []
        label_codes = {label: code for code, label in enumerate(labels)}
        images = range(len(self.image_ids)) if images is None else images
        if not images:
            return
        span = (images[0], images[-1] + 1)
        whole = span == (0, len(self.image_ids))
        ends = None if whole else (self.image_ids[images[0]], self.image_ids[images[-1]])
        batch = min(max(rows // len(self.files), _MIN_BATCH), 1 << 16)
        known = class_labels is not None
        streams = [
            _Stream(
                file.batches(
                    batch,
                    self.image_codes,
                    label_codes,
                    known,
                    masks,
                    span,
                    ends,
                    refuse_duplicates,
                )
            )
            for file in self.files
        ]
        ready: list[dict[str, np.ndarray]] = []
        size = 0
        while streams:
            streams = [stream for stream in streams if stream.fill()]
            # An image may go on in the next batch of its file: only earlier ones are complete.
            open_images = [s.last_image for s in streams if not s.finished]
            boundary = min(open_images, default=len(self.image_ids))
            pieces = [piece for s in streams if len((piece := s.pop_before(boundary))["scores"])]
            if not pieces and open_images:
                for stream in streams:
                    if not stream.finished and stream.last_image == boundary:
                        stream.fill(more=True)
            if pieces:
                ready.append(_merge(pieces))
                size += len(ready[-1]["scores"])
            if size >= rows:
                yield self._detections(concatenate(ready), label_codes)
                ready, size = [], 0
        if ready:
            yield self._detections(concatenate(ready), label_codes)

    def _detections(self, arrays: dict[str, np.ndarray], labels: dict[str, int]) -> Detections:
        return Detections(
            image_ids=self.image_ids, labels=list(labels), metadata=self.metadata, **arrays
        )


def read_detections(
    path: PathLike, class_labels: Sequence[str] | None = None, *, masks: bool = False
) -> Detections:
    """Reads a whole table; see `DetectionsReader.chunks` for the arguments and errors."""
    reader = DetectionsReader(path)
    parts = list(reader.chunks(class_labels, masks=masks))
    if not parts:
        return Detections(
            image_ids=reader.image_ids,
            labels=list(class_labels or []),
            image_index=np.zeros(0, np.int32),
            label_index=np.zeros(0, np.int32),
            scores=np.zeros(0, np.float32),
            boxes=np.zeros((0, 4), np.float32),
            metadata=reader.metadata,
            masks=np.zeros(0, object) if masks else None,
            mask_sizes=np.zeros((0, 2), np.int32) if masks else None,
        )
    names = ["image_index", "label_index", "scores", "boxes"]
    names += ["masks", "mask_sizes"] if masks else []
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return dataclasses.replace(parts[-1], **arrays)


def _table_files(path: epath.Path) -> list[epath.Path]:
    """The file, or all shards of the folder in order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder, expected a detections table")
    shards: dict[int, epath.Path] = {}
    counts = set()
    for file in sorted(path.glob("*.parquet")):
        match = _SHARD.fullmatch(file.name)
        if not match:
            raise UserError(f"{file}: not a shard name, expected {shard_name(0, 4)} and so on")
        shards[int(match[1])] = file
        counts.add(int(match[2]))
    if not shards:
        raise UserError(f"{path}: no shards in the folder, expected {shard_name(0, 4)} and so on")
    if len(counts) > 1:
        raise UserError(f"{path}: shards of {sorted(counts)} parts mixed, expected one export")
    count = counts.pop()
    for index in range(count):
        if index not in shards:
            raise UserError(f"{path}: shard {shard_name(index, count)} is missing")
    if len(shards) > count:
        raise UserError(f"{shards[max(shards)]}: shard number beyond the {count} shards")
    return [shards[index] for index in range(count)]


class _Stream:
    """Rows of one file that were read but not yet passed on."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
        self._batches = batches
        self._rows: dict[str, np.ndarray] | None = None
        self.finished = False

    def fill(self, more: bool = False) -> bool:
        """Makes sure that rows are pending (or `more` than now); False when there are none left."""
        if self._rows is None or more:
            batch = next(self._batches, None)
            if batch is None:
                self.finished = True
            else:
                self._rows = batch if self._rows is None else concatenate([self._rows, batch])
        return self._rows is not None

    @property
    def pending(self) -> dict[str, np.ndarray]:
        """The rows, of which `fill` has seen to some."""
        if self._rows is None:
            raise ValueError("no rows are pending")
        return self._rows

    @property
    def last_image(self) -> int:
        return int(self.pending["image_index"][-1])

    def pop_before(self, image: int) -> dict[str, np.ndarray]:
        """Removes and returns the rows of images before `image`."""
        rows = self.pending
        cut = int(np.searchsorted(rows["image_index"], image))
        tail = {name: array[cut:] for name, array in rows.items()}
        self._rows = tail if len(tail["scores"]) else None
        return {name: array[:cut] for name, array in rows.items()}


def _merge(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several shards in image order."""
    rows = concatenate(parts)
    if len(parts) == 1:
        return rows
    order = np.argsort(rows["image_index"], kind="stable")
    return {name: array[order] for name, array in rows.items()}
