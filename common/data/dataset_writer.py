"""Writing of dataset directories (described in common/data/dataset.py).

Shape legend: n images, m boxes and l image-level labels of one call; K classes.
"""

import contextlib
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from common.data.dataset_format import FORMAT, INDEX, OPTIONAL, STRINGS
from common.io.atomic import atomic_folder, open_atomic
from common.io.errors import UserError
from common.io.paths import PathLike

Integers = Sequence[int] | np.ndarray


class DatasetWriter:
    """Writes a dataset directory piece by piece; it appears under its name only when complete.

    Use it as a context manager: an exception inside removes what was written.

        with DatasetWriter(path, "trees", ["tree"], ["Tree"], None, image_root) as writer:
            index = writer.add_image("a", "a.jpg", (480, 640), boxes, classes)
            writer.add_split("train", [index])
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        name: str,
        class_labels: Sequence[str],
        class_names: Sequence[str],
        hierarchy: Mapping[str, Any] | None,
        image_root: str = "",
        *,
        source: str = "",
        has_masks: bool = False,
        has_areas: bool = False,
        has_ignore: bool = False,
        has_whole_boxes: bool = False,
        overwrite: bool = False,
        extra: Mapping[str, Any] | None = None,
    ):
        """Starts a dataset.

        Args:
          directory: final place; refused when it exists, unless `overwrite`.
          name: name of the set.
          class_labels: unique labels in the official order.
          class_names: names in the same order.
          hierarchy: nested dictionary under a virtual root; None writes a flat one.
          image_root: absolute folder or gs:// prefix of the photos; '' when the paths are absolute
            or relative to the dataset directory.
          source: free text, where the annotations came from.
          has_masks: whether `masks` will be given.
          has_areas: whether areas will be given.
          has_ignore: whether ignore boxes will be given.
          has_whole_boxes: whether boxes will be given as before clipping, too (by `add_images`).
          overwrite: replace an existing dataset (other folders are never replaced).
          extra: further fields of dataset.json.

        Raises:
          UserError: the output exists, or a label is given twice.
        """
        self.directory = Path(directory).absolute()
        self._overwrite = overwrite
        check_output(self.directory, overwrite)
        repeated = [label for label, count in Counter(class_labels).items() if count > 1]
        if repeated:
            raise UserError(f"{name}: class labels given twice: {repeated[:5]}")
        self.num_classes = len(class_labels)
        self.num_images = self.num_boxes = self.num_labels = 0
        self._mask_bytes = self._num_ignore = 0
        self._optional = {
            "has_masks": has_masks,
            "has_areas": has_areas,
            "has_ignore": has_ignore,
            "has_whole_boxes": has_whole_boxes,
        }
        self._strings: dict[str, list[np.ndarray]] = {name: [] for name in STRINGS}
        self._meta = {"format": FORMAT, "name": name, "source": source, "image_root": image_root}
        self._extra = dict(extra or {})
        self._output = contextlib.ExitStack()
        self.temporary = Path(self._output.enter_context(atomic_folder(self.directory)))
        for folder in ("index", "splits"):
            (self.temporary / folder).mkdir(parents=True)
        names = [k for k in INDEX if k not in OPTIONAL or self._optional[OPTIONAL[k]]]
        self._arrays = {
            key: _NpyAppender(self.temporary / "index" / f"{key}.npy", *INDEX[key][:2])
            for key in names
        }
        for key in names:
            if key.endswith("offsets"):
                self._arrays[key].append(np.zeros(1, np.int64))
        self._masks = open(self.temporary / "masks.bin", "wb") if has_masks else None
        write_classes(self.temporary / "classes.csv", class_labels, class_names)
        self.write_json("hierarchy.json", hierarchy or flat_hierarchy(class_labels))

    def add_image(
        self,
        image_id: str,
        path: str,
        size: Integers = (0, 0),
        boxes: Any = (),
        classes: Integers = (),
        flags: Integers | None = None,
        label_classes: Integers = (),
        label_confidences: Integers = (),
        masks: Sequence[Any] | None = None,
        areas: Sequence[float] | np.ndarray | None = None,
        ignore: Any = (),
    ) -> int:
        """Adds one image with n boxes, returns its index.

        Args:
          image_id: unique id.
          path: of the photo, relative to `image_root`.
          size: height, width in pixels, 0 when unknown.
          boxes: (n, 4) normalised.
          classes: (n,) class indices.
          flags: (n,) bits, 0 by default.
          label_classes: verified image-level classes.
          label_confidences: PRESENT, ABSENT or NOT_EXHAUSTIVE for each of `label_classes`.
          masks: (n,) JSON values or None.
          areas: (n,) areas of the segments, shares of the image.
          ignore: (q, 4) normalised regions in which nothing is background.
        """
        texts = [b"" if m is None else json.dumps(m).encode() for m in masks or []]
        texts = texts or [b""] * len(classes)
        self.add_images(
            [image_id],
            [path],
            np.reshape(np.asarray(size, np.int32), (1, 2)),
            [len(classes)],
            np.reshape(np.asarray(boxes, np.float32), (-1, 4)),
            np.asarray(classes, np.int32),
            np.zeros(len(classes), np.uint8) if flags is None else np.asarray(flags, np.uint8),
            [len(label_classes)],
            np.asarray(label_classes, np.int32),
            np.asarray(label_confidences, np.uint8),
            [len(text) for text in texts],
            b"".join(texts),
            areas,
            [len(ignore)],
            np.reshape(np.asarray(ignore, np.float32), (-1, 4)),
        )
        return self.num_images - 1

    def add_images(
        self,
        image_ids: Sequence[str],
        image_paths: Sequence[str],
        image_sizes: Int32[np.ndarray, "n 2"],
        box_counts: Integers,
        boxes: Float32[np.ndarray, "m 4"],
        box_classes: Int32[np.ndarray, " m"],
        box_flags: UInt8[np.ndarray, " m"],
        label_counts: Integers,
        label_classes: Int32[np.ndarray, " l"],
        label_confidences: UInt8[np.ndarray, " l"],
        mask_lengths: Integers | None = None,
        mask_bytes: bytes = b"",
        box_areas: Sequence[float] | np.ndarray | None = None,
        ignore_counts: Integers | None = None,
        ignore_boxes: Float32[np.ndarray, "q 4"] | None = None,
        whole_boxes: Float32[np.ndarray, "m 4"] | None = None,
    ) -> None:
        """Adds n images with their boxes (labels, ignore boxes) one after the other.

        Raises:
          ValueError: columns of different lengths or class indices outside 0..K-1 (a programming
            error: converters clean their input before).
        """
        num_boxes, num_labels = len(boxes), len(label_classes)
        if not len(image_ids) == len(image_paths) == len(image_sizes) == len(box_counts):
            raise ValueError("image columns of different lengths")
        if not num_boxes == len(box_classes) == len(box_flags) == int(np.sum(box_counts)):
            raise ValueError("box columns and box_counts do not agree")
        if not num_labels == len(label_confidences) == int(np.sum(label_counts)):
            raise ValueError("label columns and label_counts do not agree")
        for classes in (box_classes, label_classes):
            if len(classes) and not 0 <= classes.min() <= classes.max() < self.num_classes:
                raise ValueError(f"class index outside 0..{self.num_classes - 1}")
        if not len(image_ids):
            return
        for key, strings in zip(STRINGS, (image_ids, image_paths), strict=True):
            self._strings[key].append(np.array([text.encode() for text in strings], dtype="S"))
        self._arrays["image_size"].append(image_sizes)
        self._arrays["boxes"].append(boxes)
        self._arrays["box_class"].append(box_classes)
        self._arrays["box_flags"].append(box_flags)
        self._arrays["label_class"].append(label_classes)
        self._arrays["label_confidence"].append(label_confidences)
        self._arrays["box_offsets"].append(self.num_boxes + np.cumsum(box_counts, dtype=np.int64))
        self._arrays["label_offsets"].append(
            self.num_labels + np.cumsum(label_counts, dtype=np.int64)
        )
        if self._optional["has_areas"]:
            if box_areas is None or len(box_areas) != num_boxes:
                raise ValueError("box_areas do not agree with the boxes")
            self._arrays["box_area"].append(np.asarray(box_areas, np.float64))
        if self._optional["has_whole_boxes"]:
            self._arrays["whole_boxes"].append(boxes if whole_boxes is None else whole_boxes)
        self._add_ignore(len(image_ids), ignore_counts, ignore_boxes)
        if self._masks is not None:
            lengths = np.zeros(num_boxes, np.int64) if mask_lengths is None else mask_lengths
            if len(lengths) != num_boxes or int(np.sum(lengths)) != len(mask_bytes):
                raise ValueError("mask_lengths do not agree with the boxes or the bytes")
            self._arrays["mask_offsets"].append(
                self._mask_bytes + np.cumsum(lengths, dtype=np.int64)
            )
            self._masks.write(mask_bytes)
            self._mask_bytes += len(mask_bytes)
        self.num_images += len(image_ids)
        self.num_boxes += num_boxes
        self.num_labels += num_labels

    def _add_ignore(
        self, num_images: int, counts: Integers | None, boxes: np.ndarray | None
    ) -> None:
        boxes = np.zeros((0, 4), np.float32) if boxes is None else boxes
        counts = [0] * num_images if counts is None else counts
        if len(counts) != num_images or len(boxes) != int(np.sum(counts)):
            raise ValueError("ignore_boxes and ignore_counts do not agree")
        if self._optional["has_ignore"]:
            self._arrays["ignore_boxes"].append(boxes)
            offsets = self._num_ignore + np.cumsum(counts, dtype=np.int64)
            self._arrays["ignore_offsets"].append(offsets)
            self._num_ignore += len(boxes)
        elif len(boxes):
            raise ValueError("ignore boxes given to a writer without has_ignore")

    def add_split(self, name: str, indices: Integers) -> None:
        """Writes a split; an existing one of that name is replaced."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(f"split name {name!r}: use letters, digits, '.', '_' and '-'")
        np.save(self.temporary / "splits" / f"{name}.npy", np.asarray(indices, np.int64))

    def write_json(self, name: str, value: Any) -> None:
        """Writes one more JSON file (report.json) into the directory."""
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (self.temporary / name).write_text(text, encoding="utf-8")

    def _complete(self) -> None:
        for array in self._arrays.values():
            array.close()
        if self._masks is not None:
            self._masks.close()
        for key, parts in self._strings.items():
            strings = np.concatenate(parts) if parts else np.zeros(0, "S1")
            np.save(self.temporary / "index" / f"{key}.npy", strings)
            if key == "image_id":
                self._save_order(strings)
        self._meta |= {
            "num_images": self.num_images,
            "num_boxes": self.num_boxes,
            "num_labels": self.num_labels,
            "num_classes": self.num_classes,
            **self._optional,
            **self._extra,
        }
        self.write_json("dataset.json", self._meta)
        check_output(self.directory, self._overwrite)

    def _save_order(self, image_ids: np.ndarray) -> None:
        order = np.argsort(image_ids, kind="stable").astype(np.int32)
        ordered = image_ids[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(repeated):
            raise UserError(
                f"{self._meta['name']}: image id {ordered[repeated[0]].decode()!r} is given to "
                "two images, ids must be unique"
            )
        np.save(self.temporary / "index" / "image_id_order.npy", order)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._output.__exit__(*error)
            return
        with self._output:
            self._complete()


class _NpyAppender:
    """A .npy file that grows by rows; the header is completed by `close`."""

    _HEADER = 128  # bytes, room for any number of rows

    def __init__(self, path: Path, dtype: str, columns: int | None):
        self._dtype = np.dtype(dtype)
        self._columns = columns
        self._rows = 0
        self._file = open(path, "wb", buffering=1 << 18)
        self._file.write(b" " * self._HEADER)

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        if rows.shape[1:] != (() if self._columns is None else (self._columns,)):
            raise ValueError(f"{self._file.name}: rows of shape {rows.shape}")
        self._file.write(rows.data)
        self._rows += len(rows)

    def close(self) -> None:
        shape = (self._rows,) if self._columns is None else (self._rows, self._columns)
        header = repr({"descr": self._dtype.str, "fortran_order": False, "shape": shape})
        magic = b"\x93NUMPY\x01\x00" + (self._HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + header.encode().ljust(self._HEADER - 11) + b"\n")
        self._file.close()


def write_classes(path: PathLike, labels: Sequence[str], names: Sequence[str]) -> None:
    """Writes a classes.csv; `common.data.dataset.read_classes` reads it."""
    with open_atomic(path, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["label", "name"])
        rows.writerows(zip(labels, names, strict=True))


def flat_hierarchy(class_labels: Sequence[str]) -> dict[str, Any]:
    """All classes side by side under a virtual root."""
    return {"LabelName": "/root", "Subcategory": [{"LabelName": label} for label in class_labels]}


def check_output(directory: Path, overwrite: bool) -> None:
    """Refuses an output that exists, unless it is a dataset and may be replaced."""
    if not os.path.lexists(directory):
        return
    if not overwrite:
        raise UserError(f"{directory} exists: choose another output or add --overwrite")
    if not (directory / "dataset.json").is_file():
        raise UserError(f"{directory} exists and is no dataset directory: it will not be replaced")
