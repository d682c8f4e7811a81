"""One Parquet file of a detections table: its schema, its metadata and its rows, all checked.

Shape legend: n rows of a batch.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Int32

from common.io.errors import UserError
from common.io.json_file import parse_json
from common.io.paths import local_copy
from common.tables.table import (
    COLUMNS,
    COORDINATES,
    MASK_COLUMNS,
    METADATA_KEY,
    find_duplicate,
    find_invalid,
)

_MAX_RATIO = 64  # to which masks unfold: zstd makes run lengths about three times smaller
_ALWAYS = 64 << 20  # bytes


class TableFile:
    """One Parquet file with its checked schema and metadata."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._open = contextlib.ExitStack()
        with _reading(path):
            self._local = self._open.enter_context(local_copy(path))
            with pq.ParquetFile(self._local) as file:
                schema, parts = file.schema_arrow, file.metadata
                footer = parts.metadata or {}
                self.num_rows = parts.num_rows
        twice = [name for name in schema.names if schema.names.count(name) > 1]
        if twice:
            raise UserError(f"{path}: column {twice[0]} is there twice")
        self.has_masks = "mask" in schema.names
        for name, kind in (COLUMNS | (MASK_COLUMNS if self.has_masks else {})).items():
            if name not in schema.names:
                raise UserError(
                    f"{path}: column {name} is missing, found {', '.join(schema.names)}"
                )
            actual = schema.field(name).type
            if actual != kind and not (kind == pa.string() and actual == pa.large_string()):
                raise UserError(f"{path}: column {name} is {actual}, expected {kind}")
        with _reading(path):
            _check_sizes(path, parts)
        try:
            metadata = parse_json(footer[METADATA_KEY], path)
            self.image_ids = metadata.pop("image_ids")
            is_list = isinstance(self.image_ids, list)
            if not is_list or not all(isinstance(image_id, str) for image_id in self.image_ids):
                raise TypeError("image_ids are no list of strings")
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
            if (invalid := find_invalid(scores, boxes)) is not None:
                raise UserError(f"{self.path}: row {row + invalid[0]}: {invalid[1]}")
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
                both = arrays if tied is None else concatenate([tied, arrays])
                first = row - (0 if tied is None else len(tied["scores"]))
                if (twice := find_duplicate(**both)) is not None:
                    at = twice[1] + first - row  # the later of the two, always in this batch
                    raise UserError(
                        f"{self.path}: row {row + at}: the same as row {twice[0] + first} (image "
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
        first_rows: dict[str, int] = {}
        for row, batch in self._raw_batches(1 << 16, columns=["label"]):
            column = batch["label"]
            values = column.dictionary.to_pylist()
            for code in [code for code, label in enumerate(values) if label not in first_rows]:
                at = np.flatnonzero(column.indices.to_numpy(zero_copy_only=False) == code)
                if len(at):
                    first_rows[values[code]] = row + int(at[0])
        return first_rows

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
                    end = row + file.metadata.row_group(group).num_rows
                    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                        batch.validate(full=True)  # invalid UTF-8 would fail far from here
                        if len(batch):
                            yield row, batch
                        row += len(batch)
                    if row != end:
                        raise UserError(f"{self.path}: damaged, found {row} rows, expected {end}")
        except (pa.ArrowException, OSError) as error:
            _check_open_files(self.path, error)
            raise UserError(
                f"{self.path}: damaged after row {row} ({' '.join(str(error).split())[:200]})"
            ) from error

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


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Raises `UserError` for what pyarrow raises."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        _check_open_files(path, error)
        raise UserError(
            f"{path}: no readable Parquet file, cut or damaged "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _check_sizes(path: epath.Path, metadata: pq.FileMetaData) -> None:
    """Refuses a footer whose numbers disagree, and masks that unfold to much more than the file.

    Types have been checked: pyarrow ends the process where it is asked for a part of a column that
    has figures which its type cannot have. So no other column's parts are asked for, either.

    Raises:
      UserError: says which.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != metadata.num_rows:
        raise UserError(
            f"{path}: damaged, its parts have {rows} rows, expected {metadata.num_rows}"
        )
    if (place := _place(metadata, "mask")) is None:
        return
    for column in (group.column(place) for group in groups):
        unfolded = column.total_uncompressed_size
        if unfolded > max(_ALWAYS, _MAX_RATIO * column.total_compressed_size):
            raise UserError(
                f"{path}: masks of {unfolded:,} bytes in {column.total_compressed_size:,}, "
                f"expected at most {_MAX_RATIO} times as many"
            )


def _place(metadata: pq.FileMetaData, name: str) -> int | None:
    """Number of a column; None: there is none of that name."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return paths.index(name) if name in paths else None


def _check_open_files(path: epath.Path, error: Exception) -> None:
    """Tells a limit of the system from a damaged file.

    Raises:
      UserError: the process has as many files open as it may.
    """
    if os.strerror(errno.EMFILE) in str(error) or os.strerror(errno.ENFILE) in str(error):
        raise UserError(
            f"{path}: as many files are open as may be; raise the limit (ulimit -n), or merge the "
            "shards into fewer"
        ) from error


def _row_groups(metadata: pq.FileMetaData, first: str, last: str) -> range:
    """The row groups that may hold images from `first` to `last`, by their statistics."""
    column = _place(metadata, "image_id")
    assert column is not None  # since the file was opened
    groups = []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        known = (
            statistics is not None and statistics.has_min_max and isinstance(statistics.min, str)
        )
        if not known or (statistics.min <= last and statistics.max >= first):
            groups.append(group)
    return range(groups[0], groups[-1] + 1) if groups else range(0)


def concatenate(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
