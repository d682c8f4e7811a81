"""One file in COCO form (COCO, LVIS, Objects365) in compact form.

Shape legend: N images and m annotations of the file.
"""

import json
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int32

from common.convert.cleaning import check_pixels
from common.convert.coco_masks import MaskSpool
from common.data.dataset import ABSENT, CROWD, DEPICTION, GROUP_OF, NOT_EXHAUSTIVE
from common.io.errors import UserError
from common.io.json_stream import stream_lists

_LISTS = ("images", "annotations", "categories")
_FREQUENCIES = ("r", "c", "f")
_CONFIDENCES = {"neg_category_ids": ABSENT, "not_exhaustive_category_ids": NOT_EXHAUSTIVE}


class CocoFile:
    """Columns of numbers instead of 30 million dictionaries.

    Attributes:
      path: of the file.
      categories: id -> name.
      frequencies: id -> frequency of each category (LVIS).
      image_index: id -> position in the lists of images.
      image_files: (N) file names.
      image_sizes: (N) height and width in pixels.
      image: (m) position of the image, -1 = not listed under `images`.
      category: (m) category ids.
      xywh: (4 m) corner, width and height in pixels; NaN = missing.
      flags: (m) bits as in `dataset_format`.
      row: (m) annotation ids, for messages.
      area: (m) area of the segment in pixels, NaN = missing.
      masks: where the masks are, None where they are left out.
      labels: image, category id and confidence of the image-level labels (LVIS).
    """

    def __init__(self, path: Path, masks: IO[bytes] | None = None, lvis: bool = False):
        """Reads a file.

        Args:
          path: of the file.
          masks: spool file for the JSON texts of the masks; None leaves them out.
          lvis: read what only LVIS has: frequencies and lists of verified categories.

        Raises:
          UserError: names the annotation that lacks a field or has a wrong value.
        """
        self.path = path
        self.masks = None if masks is None else MaskSpool(masks)
        self._lvis = lvis
        self.categories: dict[int, str] = {}
        self.frequencies: dict[int, str] = {}
        self.image_index: dict[Any, int] = {}
        self.image_files: list[str] = []
        self.image_sizes: list[tuple[int, int]] = []
        self.image, self.category = array("i"), array("q")
        self.xywh, self.flags, self.row = array("f"), array("B"), array("q")
        self.area = array("d")
        self.labels = (array("i"), array("q"), array("B"))
        counts = dict.fromkeys(_LISTS, 0)
        readers = dict(
            zip(_LISTS, (self._read_image, self._read_annotation, self._read_category), strict=True)
        )
        # Files of test sets have no annotations.
        for key, value in stream_lists(path, _LISTS, optional=("annotations",)):
            counts[key] += 1
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} number {counts[key]} is no object")
            try:
                readers[key](value)
            except KeyError as error:
                raise UserError(
                    f"{path}: {key} number {counts[key]} has no field {error}; found "
                    f"{', '.join(list(value)[:12])}"
                ) from error
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{path}: {key} number {counts[key]} has a wrong value ({error}): "
                    f"{json.dumps(value)[:150]}"
                ) from error

    def boxes(self) -> Float32[np.ndarray, "m 4"]:
        """Corners of the listed images' boxes, normalised; NaN for those of unlisted images.

        Raises:
          UserError: the numbers do not look like x, y, width and height in pixels.
        """
        image = self.images()
        sizes = np.array([*self.image_sizes, (np.nan, np.nan)], np.float32)[image]
        box = np.array(self.xywh, np.float32).reshape(-1, 4)
        check_pixels(box, sizes, str(self.path), corners=False)
        box[:, 2:] += box[:, :2]
        box /= sizes[:, [1, 0, 1, 0]]
        return box

    def images(self) -> Int32[np.ndarray, " m"]:
        """Position of each annotation's image, -1 = not listed."""
        return np.frombuffer(self.image, np.int32)

    def photo_sizes(self) -> Int32[np.ndarray, "m 2"]:
        """Height and width of each annotation's image in pixels, 0 where it is not listed."""
        return np.array([*self.image_sizes, (0, 0)], np.int32)[self.images()]

    def areas(self) -> np.ndarray:
        """(m) areas of the segments as shares of their images, NaN = missing."""
        pixels = np.array([*self.image_sizes, (np.nan, np.nan)], np.float64).prod(1)
        return np.frombuffer(self.area, np.float64) / pixels[self.images()]

    def _read_category(self, value: dict[str, Any]) -> None:
        number = _integer(value["id"])
        self.categories[number] = str(value["name"])
        if self._lvis:
            frequency = value["frequency"]
            if frequency not in _FREQUENCIES:
                raise ValueError(f"frequency {frequency!r}, expected 'r', 'c' or 'f'")
            self.frequencies[number] = frequency

    def _read_image(self, value: dict[str, Any]) -> None:
        raw_id, index = value["id"], len(self.image_files)
        if self.image_index.setdefault(raw_id, index) != index:
            raise UserError(f"{self.path}: image id {raw_id!r} is given twice")
        if self._lvis and value.get("coco_url"):
            file = "/".join(str(value["coco_url"]).split("/")[-2:])
        else:
            # Some LVIS files (v1) have the address of the photo instead of its name.
            file = value.get("file_name") or value["coco_url"]
        height, width = _integer(value["height"]), _integer(value["width"])
        if height <= 0 or width <= 0:
            raise UserError(
                f"{self.path}: image id {raw_id!r} has width {width} and height {height}; boxes in "
                "pixels mean nothing without them"
            )
        self.image_files.append(str(file))
        self.image_sizes.append((height, width))
        if self._lvis:
            # Lists are missing in files of test sets.
            for key, confidence in _CONFIDENCES.items():
                for category in value.get(key) or ():
                    row = (index, _integer(category), confidence)
                    for column, item in zip(self.labels, row, strict=True):
                        column.append(item)

    def _read_annotation(self, value: dict[str, Any]) -> None:
        box = value["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {box!r}, expected [x, y, width, height]")
        self.image.append(self.image_index.get(value["image_id"], -1))
        self.category.append(_integer(value["category_id"]))
        self.xywh.extend(float("nan") if x is None else x for x in box)
        self.flags.append(
            (CROWD | GROUP_OF) * (value.get("iscrowd") == 1)
            | DEPICTION * (value.get("isfake") == 1)
        )
        area = value.get("area")
        self.area.append(float("nan") if area is None else area)
        row = value.get("id")
        self.row.append(row if isinstance(row, int) else len(self.row) + 1)
        if self.masks is not None:
            self.masks.add(value.get("segmentation"), self.row[-1])


def _integer(value: Any) -> int:
    """An id or a size; 3.0 counts, 3.5 and texts do not."""
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)
