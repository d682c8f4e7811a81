"""Detections in any order on their way in: checked, spooled by image, written as a table.

Rows go to one of several files by image; each file is then sorted in memory by itself. So memory
holds a chunk, one such file and one entry per image, whatever the order of the rows.

Shape legend: n rows of a chunk.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int

from common.io.errors import UserError
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.tables.table import COORDINATE_SLACK, find_invalid

_BUCKET_BYTES = 64 << 20  # of the source file, for one spool file
_MAX_BUCKETS = 128  # each has two open files
_ROW = np.dtype(
    [
        ("image", "<i4"),
        ("label", "<i4"),
        ("score", "<f4"),
        ("box", "<f4", 4),
        ("mask_bytes", "<i4"),
        ("mask_size", "<i4", 2),
    ]
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Detections as read from a file.

    Attributes:
      image_ids: ids that `image_index` points into.
      image_index: (n,).
      labels: labels that `label_index` points into.
      label_index: (n,).
      scores: (n,).
      boxes: (n, 4) normalised xmin, ymin, xmax, ymax.
      numbers: (n,) line or element number in the file, for messages.
      masks: (n,) compressed COCO run lengths, checked; None when the file has none.
      mask_sizes: (n, 2) height and width.
    """

    image_ids: Sequence[str]
    image_index: Int[np.ndarray, " n"]
    labels: Sequence[str]
    label_index: Int[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    numbers: Int[np.ndarray, " n"]
    masks: np.ndarray | None = None
    mask_sizes: Int[np.ndarray, "n 2"] | None = None


class Importer:
    """Collects the rows of one file and writes them as a table.

    Args:
      path: the file the rows come from, for messages.
      covered: ids of all images of the table; None = those that `cover` or rows name.
      covered_by: what says so, for messages, such as "split 'validation' of DIR".
      class_labels: labels allowed; None = any.
      masks: whether rows have masks.
      clip: cut boxes at the edge of the photo instead of refusing those beyond it.

    Attributes:
      repeated: rows that equal an earlier one; tables have each detection once.
    """

    def __init__(
        self,
        path: Path,
        covered: Sequence[str] | None = None,
        covered_by: str = "",
        class_labels: Sequence[str] | None = None,
        *,
        masks: bool = False,
        clip: bool = False,
    ):
        self._path = path
        self._fixed, self._covered_by = covered is not None, covered_by
        self._images = {image_id: code for code, image_id in enumerate(covered or ())}
        self._labels = {label: code for code, label in enumerate(class_labels or ())}
        self._known_labels = class_labels is not None
        self._seen: set[str] = set()
        self._masks, self._clip = masks, clip
        self.repeated = 0

    def cover(self, image_id: str) -> None:
        """Notes an image of a file with one row an image.

        Raises:
          UserError: named before, or not among the covered ones; without the place in the file.
        """
        if image_id in self._seen:
            raise UserError(f"image {image_id!r} is there twice")
        self._seen.add(image_id)
        self._image_code(image_id)

    def write(
        self, chunks: Iterator[Rows], output: str | os.PathLike, metadata: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Reads everything, then writes the table; returns its rows and images.

        Raises:
          UserError: a row that breaks the rules of tables; names file and row.
        """
        with DetectionsWriter(output, metadata, masks=self._masks) as writer:
            count = min(os.path.getsize(self._path) // _BUCKET_BYTES + 1, _MAX_BUCKETS)
            stem = f"{writer.temporary.name}-import"
            buckets = [_Bucket(writer.temporary.with_name(f"{stem}-{i}")) for i in range(count)]
            try:
                rows = sum(self._spool(chunk, buckets) for chunk in chunks)
                labels = np.array([*self._labels, ""], object)[:-1]
                image_ids = list(self._images)
                empty = np.ones(len(image_ids), bool)
                progress = Progress(rows, what="sorting", unit="rows")
                done = 0
                for bucket in buckets:
                    for code, detections, masks in bucket.images():
                        empty[code] = False
                        if not self._masks:
                            detections = self._each_once(detections)
                        extra = (masks, detections["mask_size"]) if self._masks else ()
                        writer.add(
                            image_ids[code],
                            labels[detections["label"]],
                            detections["score"],
                            detections["box"],
                            *extra,
                        )
                        done += len(detections)
                        progress.report(done)
                    bucket.remove()
                none = np.zeros((0, 4), np.float32)
                extra = ([], np.zeros((0, 2), np.int32)) if self._masks else ()
                for code in np.flatnonzero(empty).tolist():
                    writer.add(image_ids[code], [], none[:, 0], none, *extra)
            except OSError as error:
                raise UserError(f"{output}: cannot write the table ({error})") from error
            finally:
                for bucket in buckets:
                    bucket.remove()
        if self.repeated:
            print(f"{self._path}: {self.repeated:,} rows equal another one and are left out")
        return rows - self.repeated, len(image_ids)

    def _each_once(self, detections: np.ndarray) -> np.ndarray:
        """The rows of an image without those that equal an earlier one, which merging refuses."""
        keys = np.ascontiguousarray(detections).view(f"V{_ROW.itemsize}").reshape(-1)
        first = np.unique(keys, return_index=True)[1]
        self.repeated += len(keys) - len(first)
        return detections if len(first) == len(keys) else detections[np.sort(first)]

    def _image_code(self, image_id: str) -> int:
        code = self._images.get(image_id, -1)
        if code < 0:
            if self._fixed:
                raise UserError(f"image {image_id!r} is not in {self._covered_by}")
            code = self._images[image_id] = len(self._images)
        return code

    def _label_code(self, label: str) -> int:
        code = self._labels.get(label, -1)
        if code < 0:
            if self._known_labels:
                raise UserError(f"label {label!r} is not among the dataset's classes")
            code = self._labels[label] = len(self._labels)
        return code

    def _spool(self, rows: Rows, buckets: list["_Bucket"]) -> int:
        """Checks a chunk and appends it to the spool files; returns its length."""
        image = self._codes(rows.image_ids, rows.image_index, rows.numbers, self._image_code)
        label = self._codes(rows.labels, rows.label_index, rows.numbers, self._label_code)
        boxes = np.asarray(rows.boxes, np.float32)
        if self._clip:
            boxes = np.clip(boxes, 0, 1)
        if (invalid := find_invalid(rows.scores, boxes)) is not None:
            hint = "; --clip cuts boxes at the edge of the photo"
            outside = (boxes[invalid[0]] < -COORDINATE_SLACK).any() or (boxes[invalid[0]] > 1).any()
            raise UserError(
                f"{self._path}: row {rows.numbers[invalid[0]]}: {invalid[1]}"
                + (hint if outside and "normalised" in invalid[1] else "")
            )
        table = np.zeros(len(image), _ROW)
        table["image"], table["label"] = image, label
        table["score"], table["box"] = rows.scores, boxes
        if rows.masks is not None:
            table["mask_bytes"] = [len(mask) for mask in rows.masks]
            table["mask_size"] = rows.mask_sizes
        order = np.argsort(image % len(buckets), kind="stable")
        cuts = np.searchsorted(image[order] % len(buckets), np.arange(len(buckets) + 1))
        for bucket, start, stop in zip(buckets, cuts[:-1], cuts[1:], strict=True):
            part = order[start:stop]
            if len(part):
                bucket.add(table[part], rows.masks[part].tolist() if rows.masks is not None else ())
        return len(image)

    def _codes(self, values, index, numbers, code_of) -> np.ndarray:
        used = np.unique(index)
        codes = np.zeros(len(values), np.int32)
        for i in used:
            try:
                codes[i] = code_of(values[i])
            except UserError as error:
                row = numbers[np.argmax(index == i)]
                raise UserError(f"{self._path}: row {row}: {error}") from error
        return codes[index]


class _Bucket:
    """Rows of some of the images, in the order of the source, and their masks beside them."""

    def __init__(self, path: Path):
        self._paths = (path, path.with_name(f"{path.name}-masks"))
        self._files: list[IO[bytes]] = []

    def add(self, rows: np.ndarray, masks: Sequence[bytes]) -> None:
        if not self._files:
            self._files = [open(path, "w+b") for path in self._paths]
        self._files[0].write(rows.tobytes())
        self._files[1].write(b"".join(masks))

    def images(self) -> Iterator[tuple[int, np.ndarray, list[bytes]]]:
        """Code, rows and masks of each image."""
        if not self._files:
            return
        for file in self._files:
            file.seek(0)
        rows = np.frombuffer(self._files[0].read(), _ROW)
        texts = self._files[1].read()
        order = np.argsort(rows["image"], kind="stable")
        stops = np.cumsum(rows["mask_bytes"].astype(np.int64))
        starts = stops - rows["mask_bytes"]
        codes, first = np.unique(rows["image"][order], return_index=True)
        for code, begin, end in zip(codes, first, [*first[1:], len(order)], strict=True):
            part = order[begin:end]
            masks = [texts[starts[i] : stops[i]] for i in part]
            yield int(code), rows[part], masks

    def remove(self) -> None:
        for file in self._files:
            file.close()
        self._files = []
        for path in self._paths:
            path.unlink(missing_ok=True)
