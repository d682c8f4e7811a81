"""The dataset directory: a flat, memory-mapped annotation index beside photos left as they are.

    dataset.json    {"format": 1, "name", "source", "image_root", "num_images", "num_boxes", ...}
    classes.csv     label,name in the official order (labels are unique, names need not be)
    hierarchy.json  nested {"LabelName", "Subcategory": [...]} under a virtual root
    report.json     rows dropped or repaired while converting, by reason, with examples
    splits/*.npy    int64 image indices
    index/*.npy     the arrays of `dataset_format.INDEX`, memory-mapped: page cache, not heap
    statistics/     shapes of the boxes of splits, found by trainings that need them (optional)
    masks.bin       JSON texts, one a box: {"png": path} | COCO polygons | COCO RLE (optional)

Boxes with the flag CROWD are regions of many objects (COCO's `iscrowd`); they have GROUP_OF too, by
which the metrics know them. Sets with `has_ignore` in dataset.json also have ignore boxes: regions
of a photo of which the annotations do not say what is in them, so that nothing there is background.

Sets made of COCO and LVIS files keep the `category_ids` of their classes in dataset.json, LVIS
also the `frequency` of each class in the training set, "r", "c" or "f".

Shape legend: N images, M boxes of all images, L verified image labels of all images, Q ignore boxes
of all images, K classes.
Boxes are xmin, ymin, xmax, ymax, normalised to [0, 1], continuous and half-open.
"""

import csv
import dataclasses
import io
import os
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt8

from common.data.dataset_check import check_index, check_meta, check_split, check_tree
from common.data.dataset_format import (
    ABSENT,
    CROWD,
    DEPICTION,
    GROUP_OF,
    INDEX,
    INSIDE,
    NOT_EXHAUSTIVE,
    OCCLUDED,
    OPTIONAL,
    PRESENT,
    STRINGS,
    TRUNCATED,
)
from common.data.dataset_writer import DatasetWriter, check_output, flat_hierarchy
from common.io.errors import UserError
from common.io.json_file import parse_json, read_json
from common.io.paths import PathLike, to_epath

__all__ = [
    "ABSENT",
    "CROWD",
    "DEPICTION",
    "GROUP_OF",
    "INSIDE",
    "NOT_EXHAUSTIVE",
    "OCCLUDED",
    "PRESENT",
    "TRUNCATED",
    "Dataset",
    "DatasetWriter",
    "check_output",
    "flat_hierarchy",
    "read_classes",
]

# What np.load raises on a damaged file: its header is a Python literal.
_BROKEN = (
    *(OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError, KeyError, TypeError),
    *(OverflowError, tokenize.TokenError),
)
# Files of the index whose attribute has another name.
_ATTRIBUTES = {
    "image_id": "image_ids",
    "image_path": "image_paths",
    "image_size": "image_sizes",
    "box_class": "box_classes",
    "label_class": "label_classes",
    "label_confidence": "label_confidences",
    "box_area": "box_areas",
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An opened dataset directory; every array is a read-only memory map.

    Attributes:
      directory: where it lies.
      meta: content of dataset.json.
      class_labels: (K,) unique labels (for OpenImages the MIDs) in the official order.
      class_names: (K,) names to show; not necessarily unique.
      hierarchy: nested dictionary of labels under a virtual root.
      splits: names of the splits.
      image_ids: (N,) bytes.
      image_paths: (N,) bytes, relative to `image_root` (or absolute).
      image_sizes: (N, 2) height and width in pixels after EXIF rotation, 0 where unknown.
      box_offsets: (N + 1,) rows of `boxes` that belong to image i: box_offsets[i]:box_offsets[i+1].
      boxes: (M, 4) normalised.
      box_classes: (M,) class indices 0..K-1.
      box_flags: (M,) bits GROUP_OF, OCCLUDED, TRUNCATED, DEPICTION, INSIDE, CROWD.
      label_offsets: (N + 1,) like box_offsets for the verified image-level labels.
      label_classes: (L,) class indices.
      label_confidences: (L,) PRESENT or ABSENT, both verified, or NOT_EXHAUSTIVE.
      image_id_order: (N,) indices that sort `image_ids`.
      mask_offsets: (M + 1,) byte ranges in masks.bin, or None when the set has no masks.
      box_areas: (M,) area of the object's segment as annotated, as a share of the image's pixels;
        None when the source has none.
      whole_boxes: (M, 4) normalised, as the file has them: they may reach beyond the photo, where
        `boxes` are clipped; None when none does, or the source's metric does not ask for it.
      ignore_offsets: (N + 1,) like box_offsets for the ignore boxes; None when the set has none.
      ignore_boxes: (Q, 4) normalised.
    """

    directory: Path
    meta: dict[str, Any]
    class_labels: list[str]
    class_names: list[str]
    hierarchy: dict[str, Any]
    splits: list[str]
    image_ids: np.ndarray
    image_paths: np.ndarray
    image_sizes: Int32[np.ndarray, "N 2"]
    box_offsets: Int64[np.ndarray, " N+1"]
    boxes: Float32[np.ndarray, "M 4"]
    box_classes: Int32[np.ndarray, " M"]
    box_flags: UInt8[np.ndarray, " M"]
    label_offsets: Int64[np.ndarray, " N+1"]
    label_classes: Int32[np.ndarray, " L"]
    label_confidences: UInt8[np.ndarray, " L"]
    image_id_order: Int32[np.ndarray, " N"]
    mask_offsets: Int64[np.ndarray, " M+1"] | None
    box_areas: Float64[np.ndarray, " M"] | None = None
    whole_boxes: Float32[np.ndarray, "M 4"] | None = None
    ignore_offsets: Int64[np.ndarray, " N+1"] | None = None
    ignore_boxes: Float32[np.ndarray, "Q 4"] | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike, image_root: str | None = None) -> "Dataset":
        """Opens a dataset directory without reading the arrays.

        Args:
          directory: what `scripts.prepare_data` wrote.
          image_root: overrides the recorded folder (or gs:// prefix) of the photos.

        Raises:
          UserError: no dataset there, another format, or an index file that is missing or cut.
        """
        directory = Path(directory)
        path = directory / "dataset.json"
        meta = check_meta(path, _read_json(path, hint="run python -m scripts.prepare_data"))
        if image_root is not None:
            meta["image_root"] = image_root
        labels, names = read_classes(directory / "classes.csv")
        if len(labels) != meta["num_classes"] or len(set(labels)) != len(labels):
            raise UserError(
                f"{directory}/classes.csv: {len(set(labels))} different labels in {len(labels)} "
                f"rows, dataset.json says {meta['num_classes']} classes: prepare the data again"
            )
        arrays: dict[str, Any] = {
            name: _load(directory, name) for name in (*STRINGS, "image_id_order")
        }
        for name in INDEX:
            absent = name in OPTIONAL and not meta.get(OPTIONAL[name])
            arrays[name] = None if absent else _load(directory, name)
        check_index(directory, meta, arrays)
        hierarchy = _read_json(directory / "hierarchy.json")
        check_tree(directory / "hierarchy.json", hierarchy)
        return cls(
            directory=directory,
            meta=meta,
            class_labels=labels,
            class_names=names,
            hierarchy=hierarchy,
            splits=sorted(path.stem for path in (directory / "splits").glob("*.npy")),
            **{_ATTRIBUTES.get(name, name): array for name, array in arrays.items()},
        )

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_labels)

    @property
    def image_root(self) -> str:
        """Folder or gs:// prefix of the photos; the dataset directory when none is recorded."""
        return self.meta["image_root"] or str(self.directory)

    def split(self, name: str) -> Int64[np.ndarray, " n"]:
        """Image indices of a split; a `UserError` names the known splits when there is no such."""
        if name not in self.splits:
            raise UserError(
                f"{self.directory}: no split {name!r}; it has {', '.join(self.splits) or 'none'}"
            )
        path = self.directory / "splits" / f"{name}.npy"
        try:
            members = np.load(path)
        except _BROKEN as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: broken or missing split ({text})") from error
        return check_split(path, members, self.num_images)

    def image_id(self, index: int) -> str:
        return self.image_ids[index].decode()

    def image_file(self, index: int) -> str:
        """Full path (or gs:// address) of a photo."""
        return os.path.join(self.image_root, self.image_paths[index].decode())

    def image_boxes(
        self, index: int
    ) -> tuple[Float32[np.ndarray, "n 4"], Int32[np.ndarray, " n"], UInt8[np.ndarray, " n"]]:
        """Normalised boxes, class indices and flags of one image."""
        rows = slice(self.box_offsets[index], self.box_offsets[index + 1])
        return self.boxes[rows], self.box_classes[rows], self.box_flags[rows]

    def image_labels(self, index: int) -> tuple[Int32[np.ndarray, " n"], UInt8[np.ndarray, " n"]]:
        """Classes verified at image level and their confidences (`label_confidences`)."""
        rows = slice(self.label_offsets[index], self.label_offsets[index + 1])
        return self.label_classes[rows], self.label_confidences[rows]

    def image_ignore_boxes(self, index: int) -> Float32[np.ndarray, "n 4"]:
        """Normalised regions of one image in which nothing is background; crowds not among them."""
        if self.ignore_offsets is None or self.ignore_boxes is None:
            return np.zeros((0, 4), np.float32)
        return self.ignore_boxes[self.ignore_offsets[index] : self.ignore_offsets[index + 1]]

    def image_masks(self, index: int) -> list[Any]:
        """One entry a box: None, {"png": full path}, polygon list or RLE dictionary."""
        first, last = int(self.box_offsets[index]), int(self.box_offsets[index + 1])
        if self.mask_offsets is None:
            return [None] * (last - first)
        offsets = np.asarray(self.mask_offsets[first : last + 1])
        if (np.diff(offsets) < 0).any() or not 0 <= offsets[0] <= offsets[-1] <= self.mask_offsets[
            -1
        ]:
            raise UserError(
                f"{self.directory}/index/mask_offsets.npy: offsets that fall at image "
                f"{self.image_id(index)!r}: prepare the data again"
            )
        with open(self.directory / "masks.bin", "rb") as file:
            file.seek(offsets[0])
            data = file.read(int(offsets[-1] - offsets[0]))
        ends = offsets - offsets[0]
        texts = [data[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
        where = f"{self.directory}/masks.bin: image {self.image_id(index)!r}"
        masks = [parse_json(text, where) if text else None for text in texts]
        root = self.meta.get("mask_root") or str(self.directory)
        for mask in masks:
            if isinstance(mask, dict) and "png" in mask:
                mask["png"] = os.path.join(root, mask["png"])
        return masks

    def find_images(self, image_ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Indices of the images with these ids, -1 where the set has no such image."""
        width = self.image_ids.dtype.itemsize
        encoded = [image_id.encode() for image_id in image_ids]
        # A query longer than all ids would make NumPy copy the whole table in that width.
        fits = np.array([len(query) <= width for query in encoded], bool)
        queries = np.array(
            [query if fit else b"" for query, fit in zip(encoded, fits, strict=True)],
            dtype=self.image_ids.dtype,
        )
        if not self.num_images or not len(queries):
            return np.full(len(encoded), -1, np.int64)
        place = np.searchsorted(self.image_ids, queries, sorter=self.image_id_order)
        index = self.image_id_order[np.minimum(place, self.num_images - 1)].astype(np.int64)
        return np.where(fits & (self.image_ids[index] == queries), index, -1)


def read_classes(path: PathLike) -> tuple[list[str], list[str]]:
    """Labels and names of a classes.csv (header label,name), local or gs://."""
    try:
        rows = list(csv.reader(io.StringIO(to_epath(path).read_text())))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot read the classes ({error})") from error
    if not rows or rows[0] != ["label", "name"] or any(len(row) != 2 for row in rows):
        raise UserError(f"{path}: expected two columns with the header label,name")
    return [row[0] for row in rows[1:]], [row[1] for row in rows[1:]]


def _read_json(path: Path, hint: str = "the directory is incomplete") -> dict[str, Any]:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path.parent} is no dataset directory, no {path.name}: {hint}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error


def _load(directory: Path, name: str) -> np.ndarray:
    path = directory / "index" / f"{name}.npy"
    try:
        # Not as np.memmap, whose every slice costs microseconds of Python.
        return np.load(path, mmap_mode="r").view(np.ndarray)
    except _BROKEN as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: broken or missing index file ({text})") from error
