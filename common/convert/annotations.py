"""Annotations as columns: what every source format is read into before cleaning and writing.

Shape legend: M boxes and L image-level labels in the order of the source files, N images.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BOX_COLUMNS = {
    "image": "int32",  # index into the image table
    "class": "int32",  # class index, -1 = not in the list
    "box": "float32",  # xmin, ymin, xmax, ymax, normalised
    "flags": "uint8",
    "file": "int32",  # index into Annotations.files
    "row": "int64",  # line number, annotation id or number of the object: for reports
}
LABEL_COLUMNS = {
    "image": "int32",
    "class": "int32",
    "confidence": "uint8",
    "file": "int32",
    "row": "int64",
}
# Area of the segment as a share of the image's pixels, where the source tells it.
AREA_COLUMNS = {"area": "float64"}
# Where the JSON text of a box's mask lies in the spool file (length 0 = no mask), and its checksum.
MASK_COLUMNS = {"mask_start": "int64", "mask_length": "int32", "mask_check": "uint32"}


class Columns:
    """Named columns that grow by blocks and are concatenated once."""

    def __init__(self, dtypes: Mapping[str, str]):
        self._dtypes = dict(dtypes)
        self._blocks: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}

    def append(self, **columns: Any) -> None:
        """Adds one block; every column must be given."""
        for name, dtype in self._dtypes.items():
            self._blocks[name].append(np.asarray(columns[name], dtype))

    def take(self) -> dict[str, np.ndarray]:
        """Returns the full columns and forgets the blocks, so that memory holds each once."""
        table = {}
        for name, dtype in self._dtypes.items():
            blocks = self._blocks.pop(name)
            empty = np.zeros((0, 4) if name == "box" else 0, dtype)
            table[name] = np.concatenate(blocks) if blocks else empty
        return table


class ImageTable:
    """Images in order of first appearance.

    Attributes:
      ids: unique ids.
      files: file name (or path) of the photo in the source, '' = to be found by the id.
      sizes: index -> (height, width), where the annotations tell it.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.files: dict[int, str] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self._index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, image_id: str) -> int:
        """Index of the image, which is new if it has to be."""
        index = self._index.get(image_id)
        if index is None:
            index = self._index[image_id] = len(self.ids)
            self.ids.append(image_id)
        return index

    def find(self, image_id: str) -> int:
        """Index of the image, -1 when there is none."""
        return self._index.get(image_id, -1)

    def add_all(self, image_ids: Iterable[str]) -> np.ndarray:
        return np.array([self.add(image_id) for image_id in image_ids], np.int32)


@dataclasses.dataclass
class Annotations:
    """One data set, read but not cleaned.

    Attributes:
      name: name of the set.
      source: where it was read from.
      class_labels: unique labels in the official order.
      class_names: names to show.
      hierarchy: nested dictionary, None = flat.
      images: the image table.
      splits: name -> image indices.
      boxes: columns of BOX_COLUMNS (and MASK_COLUMNS when `mask_spool` is given, AREA_COLUMNS when
        every box has an area).
      labels: columns of LABEL_COLUMNS.
      files: names of the source files.
      search: folder in which photos are looked for when none is given by the user.
      mask_spool: file with the JSON texts of the masks.
      near: image -> path of its file of annotations, where the photo lies near that (VOC).
      other_files: image -> second name of its photo, where the annotations tell two (VOC).
      unsized: images of unknown size, whose boxes and areas are in pixels until it is known.
      photo_folder: folder of photos that moves into the dataset (TFDS).
      extra: further fields of dataset.json.
    """

    name: str
    source: str
    class_labels: list[str]
    class_names: list[str]
    hierarchy: dict[str, Any] | None
    images: ImageTable
    splits: dict[str, np.ndarray]
    boxes: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    files: list[str]
    search: Path = Path()
    mask_spool: Path | None = None
    near: dict[int, str] | None = None
    other_files: dict[int, str] = dataclasses.field(default_factory=dict)
    unsized: set[int] = dataclasses.field(default_factory=set)
    photo_folder: Path | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
