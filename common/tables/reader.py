"""Checked reading of detections tables (`common.tables` describes the format).

Shape legend: n detections.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Int32

from common.io.errors import UserError
from common.io.paths import PathLike, local_copy
from common.tables.table import (
    COLUMNS,
    COORDINATES,
    MASK_COLUMNS,
    METADATA_KEY,
    Detections,
    find_duplicate,
    find_invalid,
    shard_name,
)

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
        self.path = epath.Path(path)
        self.files = [_TableFile(file) for file in _table_files(self.path)]
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
                yield self._detections(_concatenate(ready), label_codes)
                ready, size = [], 0
        if ready:
            yield self._detections(_concatenate(ready), label_codes)

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
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
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


class _TableFile:
    """One Parquet file with its checked schema and metadata."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._open = contextlib.ExitStack()
        try:
            self._local = self._open.enter_context(local_copy(path))
            with pq.ParquetFile(self._local) as file:
                schema = file.schema_arrow
                footer = file.metadata.metadata or {}
                self.num_rows = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: no readable Parquet file, cut or damaged ({error})"
            ) from error
        self.has_masks = "mask" in schema.names
        for name, kind in (COLUMNS | (MASK_COLUMNS if self.has_masks else {})).items():
            if name not in schema.names:
                raise UserError(
                    f"{path}: column {name} is missing, found {', '.join(schema.names)}"
                )
            found = schema.field(name).type
            if found != kind and not (kind == pa.string() and found == pa.large_string()):
                raise UserError(f"{path}: column {name} is {found}, expected {kind}")
        try:
            metadata = json.loads(footer[METADATA_KEY])
            self.image_ids = metadata.pop("image_ids")
            if not all(isinstance(image_id, str) for image_id in self.image_ids):
                raise TypeError("image_ids are no strings")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: file metadata {METADATA_KEY.decode()!r}: expected a JSON object with "
                f"the list image_ids ({type(error).__name__}: {error})"
            ) from error
        self.metadata = metadata

    def batches(
        self,
        size: int,
        image_codes: Mapping[str, int],
        label_codes: dict[str, int],
        labels_known: bool,
        masks: bool,
        span: tuple[int, int],
        ends: tuple[str, str] | None,
        refuse_duplicates: bool,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields checked rows of the images from span[0] to span[1] - 1, whose ids are `ends`.

        Unless `labels_known`, new labels are added to `label_codes`.
        """
        codes = image_codes
        if len(self.image_ids) < len(image_codes):
            codes = {image_id: image_codes[image_id] for image_id in self.image_ids}
        last_image, last_score = -1, np.inf
        tied: dict[str, np.ndarray] | None = None  # last rows, of one image and score
        for row, batch in self._raw_batches(size, masks, ends):
            self._check_nulls(batch, row)
            if not labels_known:
                for label in batch["label"].unique().to_pylist():
                    label_codes.setdefault(label, len(label_codes))
            image_index = self._encode(batch["image_id"], codes, row, "covered image ids")
            label_index = self._encode(batch["label"], label_codes, row, "dataset's classes")
            scores = batch["score"].to_numpy()
            boxes = np.stack([batch[name].to_numpy() for name in COORDINATES], axis=1)
            if (found := find_invalid(scores, boxes)) is not None:
                raise UserError(f"{self.path}: row {row + found[0]}: {found[1]}")
            before_image = np.concatenate([[last_image], image_index[:-1]])
            before_score = np.concatenate([[last_score], scores[:-1]])
            unsorted = (image_index < before_image) | (
                (image_index == before_image) & (scores > before_score)
            )
            if unsorted.any():
                at = int(np.argmax(unsorted))
                raise UserError(
                    f"{self.path}: row {row + at}: image {batch['image_id'][at].as_py()!r}, score "
                    f"{scores[at]:g} is out of order, expected rows sorted by image id, then score "
                    "descending"
                )
            last_image, last_score = image_index[-1], scores[-1]
            arrays = dict(
                image_index=image_index, label_index=label_index, scores=scores, boxes=boxes
            )
            if refuse_duplicates:
                both = arrays if tied is None else _concatenate([tied, arrays])
                first = row - (0 if tied is None else len(tied["scores"]))
                if (found := find_duplicate(**both)) is not None:
                    at = found[1] + first - row  # the later of the two, always in this batch
                    raise UserError(
                        f"{self.path}: row {row + at}: the same as row {found[0] + first} (image "
                        f"{batch['image_id'][at].as_py()!r}, {batch['label'][at].as_py()!r}, score "
                        f"{scores[at]:g}), expected every detection once"
                    )
                same = (both["image_index"] == last_image) & (both["scores"] == last_score)
                tied = {name: array[same].copy() for name, array in both.items()}
            if masks:
                arrays["masks"] = np.array(batch["mask"].to_pylist() + [None], object)[:-1]
                sizes = [batch[name].to_numpy() for name in ("mask_height", "mask_width")]
                arrays["mask_sizes"] = np.stack(sizes, axis=1)
            if span[0] <= image_index[0] and last_image < span[1]:
                yield arrays
                continue
            chosen = slice(*np.searchsorted(image_index, span))
            if chosen.start < chosen.stop:
                yield {name: array[chosen] for name, array in arrays.items()}

    def labels(self) -> dict[str, int]:
        """The labels of the rows, each with the first row that has it."""
        found: dict[str, int] = {}
        for row, batch in self._raw_batches(1 << 16, columns=["label"]):
            column = batch["label"]
            values = column.dictionary.to_pylist()
            for code in [code for code, label in enumerate(values) if label not in found]:
                at = np.flatnonzero(column.indices.to_numpy(zero_copy_only=False) == code)
                if len(at):
                    found[values[code]] = row + int(at[0])
        return found

    def _raw_batches(
        self,
        size: int,
        masks: bool = False,
        ends: tuple[str, str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields batches and their first rows; with `ends`, of the row groups that may hold images
        between these two ids."""
        columns = columns or [*COLUMNS, *(MASK_COLUMNS if masks else ())]
        row = 0
        try:
            with pq.ParquetFile(
                self._local, read_dictionary=["image_id", "label"], page_checksum_verification=True
            ) as file:
                groups = range(file.num_row_groups)
                if ends is not None:
                    groups = _row_groups(file.metadata, *ends)
                row = sum(file.metadata.row_group(g).num_rows for g in range(groups.start))
                # One by one: of several, the compressed bytes of all are read at once.
                for group in groups:
                    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                        if len(batch):
                            yield row, batch
                        row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: damaged after row {row} ({error})") from error

    def _check_nulls(self, batch: pa.RecordBatch, row: int) -> None:
        for name in batch.schema.names:
            if batch[name].null_count:
                at = batch[name].is_null().to_numpy(zero_copy_only=False).argmax()
                raise UserError(f"{self.path}: row {row + at}: {name} is empty")

    def _encode(
        self, column: pa.DictionaryArray, codes: Mapping[str, int], row: int, known: str
    ) -> Int32[np.ndarray, " n"]:
        """Codes of a string column; a `UserError` names the first row with an unknown string."""
        values = column.dictionary.to_pylist()
        table = np.array([codes.get(value, -1) for value in values], np.int32)
        encoded = table[column.indices.to_numpy()]
        if (encoded < 0).any():
            at = int(np.argmax(encoded < 0))
            raise UserError(
                f"{self.path}: row {row + at}: {column[at].as_py()!r} is not among the {known}"
            )
        return encoded


def _row_groups(metadata: pq.FileMetaData, first: str, last: str) -> range:
    """The row groups that may hold images from `first` to `last`, by their statistics."""
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("image_id")
    groups = []
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group).column(column).statistics
        known = found is not None and found.has_min_max and isinstance(found.min, str)
        if not known or (found.min <= last and found.max >= first):
            groups.append(group)
    return range(groups[0], groups[-1] + 1) if groups else range(0)


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
                self._rows = batch if self._rows is None else _concatenate([self._rows, batch])
        return self._rows is not None

    @property
    def last_image(self) -> int:
        return int(self._rows["image_index"][-1])

    def pop_before(self, image: int) -> dict[str, np.ndarray]:
        """Removes and returns the rows of images before `image`."""
        cut = int(np.searchsorted(self._rows["image_index"], image))
        head = {name: array[:cut] for name, array in self._rows.items()}
        tail = {name: array[cut:] for name, array in self._rows.items()}
        self._rows = tail if len(tail["scores"]) else None
        return head


def _concatenate(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _merge(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several shards in image order."""
    rows = _concatenate(parts)
    if len(parts) == 1:
        return rows
    order = np.argsort(rows["image_index"], kind="stable")
    return {name: array[order] for name, array in rows.items()}
