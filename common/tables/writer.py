"""Streamed, atomic writing of detections tables (`common.tables` describes the format).

Shape legend: n detections of one image.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32

from common.io.atomic import atomic_file
from common.io.errors import UserError
from common.io.paths import PathLike, to_epath
from common.tables.table import (
    COLUMNS,
    COORDINATES,
    MASK_COLUMNS,
    METADATA_KEY,
    find_invalid,
    shard_name,
)

ROW_GROUP = 1 << 16  # rows; whole images, so a group may be larger

# One detection in the spool file; masks lie in a second file, at the sum of the earlier lengths.
_ROW = np.dtype(
    [
        ("label", "<i4"),
        ("score", "<f4"),
        ("box", "<f4", 4),
        ("mask_start", "<i8"),
        ("mask_bytes", "<i4"),
        ("mask_size", "<i4", 2),
    ]
)
_NO_ROWS = np.zeros(0, _ROW)


class DetectionsWriter:
    """Writes a table image by image, in any order; it appears under its name only when complete.

    Rows are spooled to a file beside the output (for a gs:// output, on the local disk) and sorted
    on closing, so memory holds one entry per image. Use it as a context manager: an exception
    inside removes what was written.

        with DetectionsWriter("x.parquet", {"model": "r50", "split": "test", ...}) as writer:
            writer.add("image", ["/m/01g317"], scores, boxes)
    """

    def __init__(
        self,
        path: PathLike,
        metadata: Mapping[str, Any],
        *,
        process_index: int = 0,
        process_count: int = 1,
        masks: bool = False,
    ):
        """Starts a table.

        Args:
          path: Parquet file, local or gs://; with several processes the folder of the shards.
          metadata: model, config, dataset, split, step...; anything JSON holds. `image_ids` is
            added. All processes give the same.
          process_index: of this host.
          process_count: number of hosts, each of which writes one shard.
          masks: whether the table has mask columns.

        Raises:
          UserError: a folder lies where a file shall be or the reverse, or no place to write to.
        """
        self.path = to_epath(path)
        self._metadata = dict(metadata)
        json.dumps(self._metadata)
        self._masks = masks
        self._spans: dict[str, tuple[int, int]] = {}
        self._labels: dict[str, int] = {}
        self._num_rows = self._mask_bytes = 0
        self._output = contextlib.ExitStack()
        try:
            if process_count > 1:
                self.path.mkdir(parents=True, exist_ok=True)
                self.path = self.path / shard_name(process_index, process_count)
            self.temporary = self._output.enter_context(atomic_file(self.path))
            self._spool = self._scratch("rows")
            self._mask_file = self._scratch("masks")
        except OSError as error:
            raise UserError(f"{path}: cannot write the detections table ({error})") from error

    def _scratch(self, name: str) -> IO[bytes]:
        """A file beside the temporary one, which goes with it."""
        path = self.temporary.with_name(f"{self.temporary.name}-{name}")
        file = open(path, "wb")
        self._output.callback(path.unlink, missing_ok=True)
        self._output.callback(file.close)
        return file

    def add(
        self,
        image_id: str,
        labels: Sequence[str],
        scores: Float32[np.ndarray, " n"],
        boxes: Float32[np.ndarray, "n 4"],
        masks: Sequence[bytes] | np.ndarray | None = None,
        mask_sizes: Int32[np.ndarray, "n 2"] | None = None,
    ) -> None:
        """Adds all detections of one image (none is fine, the image counts as covered).

        Args:
          image_id: id not given before.
          labels: labels of the dataset, e.g. MIDs.
          scores: in any order; equal scores keep theirs.
          boxes: normalised xmin, ymin, xmax, ymax.
          masks: COCO compressed RLE counts, when the table has masks.
          mask_sizes: height and width of the masks.

        Raises:
          UserError: the image was added before, a value breaks the rules, or the disk is full.
        """
        if image_id in self._spans:
            raise UserError(f"{self.path}: image {image_id!r} is added twice")
        scores = np.asarray(scores, np.float32)
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        if not len(labels) == len(scores) == len(boxes):
            raise ValueError(f"{len(labels)} labels, {len(scores)} scores, {len(boxes)} boxes")
        if (invalid := find_invalid(scores, boxes)) is not None:
            raise UserError(f"{self.path}: image {image_id!r}, row {invalid[0]}: {invalid[1]}")
        rows = np.zeros(len(scores), _ROW)
        codes = self._labels
        rows["label"] = [codes.setdefault(str(label), len(codes)) for label in labels]
        rows["score"], rows["box"] = scores, boxes
        try:
            if self._masks:
                if masks is None:
                    raise ValueError("a table with masks needs one for each detection")
                sizes = np.array([len(mask) for mask in masks], np.int64)
                rows["mask_start"] = self._mask_bytes + np.cumsum(sizes) - sizes
                rows["mask_bytes"], rows["mask_size"] = sizes, mask_sizes
                self._mask_file.write(b"".join(masks))
                self._mask_bytes += int(sizes.sum())
            self._spool.write(rows[np.argsort(-scores, kind="stable")].data)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the detections table ({error})") from error
        self._spans[image_id] = (self._num_rows, len(scores))
        self._num_rows += len(scores)

    def add_empty(self, image_id: str) -> None:
        """Adds an image without detections, in a table with masks or without."""
        none = np.zeros((0, 4), np.float32)
        self.add(image_id, [], none[:, 0], none, [], np.zeros((0, 2), np.int32))

    def close(self) -> None:
        """Sorts the rows by image, writes the Parquet file and moves it into place."""
        with self._output:
            self._spool.close()
            self._mask_file.close()
            self._write_parquet()

    def _write_parquet(self) -> None:
        columns = COLUMNS | (MASK_COLUMNS if self._masks else {})
        schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
        image_ids = sorted(self._spans)
        spans = np.array([self._spans[i] for i in image_ids], np.int64).reshape(-1, 2)
        ends = np.cumsum(spans[:, 1])
        with pq.ParquetWriter(
            self.temporary,
            schema,
            compression="zstd",
            use_dictionary=["image_id", "label"],
            write_page_checksum=True,
        ) as file:
            first = 0
            while first < len(image_ids):
                rows_before = ends[first] - spans[first, 1]
                last = int(np.searchsorted(ends, rows_before + ROW_GROUP, "right"))
                last = max(last, first + 1)
                counts = spans[first:last, 1]
                owner = np.repeat(np.arange(last - first), counts)
                within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
                # Mapped anew each time: pages of earlier groups leave the process.
                spool = np.memmap(self._spool.name, _ROW, "r") if len(owner) else _NO_ROWS
                rows = spool[spans[first:last, 0][owner] + within]
                file.write_table(self._table(image_ids[first:last], owner, rows, schema))
                first = last
            metadata = {**self._metadata, "image_ids": image_ids}
            file.add_key_value_metadata({METADATA_KEY: json.dumps(metadata)})

    def _table(
        self, image_ids: list[str], owner: np.ndarray, rows: np.ndarray, schema: pa.Schema
    ) -> pa.Table:
        columns = {
            "image_id": _strings(owner, image_ids),
            "label": _strings(rows["label"], list(self._labels)),
            "score": np.ascontiguousarray(rows["score"]),
        }
        for column, name in enumerate(COORDINATES):
            columns[name] = np.ascontiguousarray(rows["box"][:, column])
        if self._masks:
            with open(self._mask_file.name, "rb") as file:
                masks = []
                for start, size in zip(rows["mask_start"], rows["mask_bytes"], strict=True):
                    file.seek(start)
                    masks.append(file.read(size))
            columns["mask"] = masks
            columns["mask_height"] = np.ascontiguousarray(rows["mask_size"][:, 0])
            columns["mask_width"] = np.ascontiguousarray(rows["mask_size"][:, 1])
        return pa.table(columns, schema=schema)

    def __enter__(self) -> "DetectionsWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.close()
        else:
            self._output.__exit__(*error)


def _strings(codes: np.ndarray, values: Sequence[str]) -> pa.Array:
    """String column from codes."""
    column = pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32)), pa.array(values, pa.string())
    )
    return column.cast(pa.string())
