"""One file in COCO form (COCO, LVIS, Objects365) in compact form.

Shape legend: N images and m annotations of the file.
"""

import json
import math
import struct
from array import array
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
from jaxtyping import Float32, Int32

from common.convert.cleaning import check_pixels
from common.convert.coco_masks import MaskSpool
from common.convert.report import REPAIRED, Report
from common.convert.segments import box_of, clean_segmentation
from common.data.class_list import class_name
from common.data.dataset import ABSENT, CROWD, DEPICTION, GROUP_OF, NOT_EXHAUSTIVE
from common.io.errors import UserError
from common.io.json_file import text_id, whole
from common.io.json_stream import stream_lists

_LISTS = ("images", "annotations", "categories")
_FREQUENCIES = ("r", "c", "f")
_CONFIDENCES = {"neg_category_ids": ABSENT, "not_exhaustive_category_ids": NOT_EXHAUSTIVE}


class CocoFile:
    """Columns of numbers instead of 30 million dictionaries.

    Attributes:
      path: of the file.
      categories: id -> name; ids are texts, as those of images.
      frequencies: id -> frequency of each category (LVIS).
      category_ids: ids that annotations speak of; `category` and `labels` have places in it.
      image_index: id -> position in the lists of images.
      image_files: (N) file names.
      image_sizes: (N) height and width in pixels, 0 = not told.
      image: (m) position of the image, -1 = not listed under `images`.
      category: (m) places of the category ids.
      xywh: (4 m) corner, width and height in pixels; NaN = missing.
      flags: (m) bits as in `dataset_format`.
      row: (m) annotation ids, for messages.
      area: (m) area of the segment in pixels, NaN = missing.
      masks: where the masks are, None where they are left out.
      labels: image, category id and confidence of the image-level labels (LVIS).
    """

    def __init__(
        self,
        path: Path,
        masks: IO[bytes] | None = None,
        lvis: bool = False,
        report: Report | None = None,
    ):
        """Reads a file.

        Args:
          path: of the file.
          masks: spool file for the JSON texts of the masks; None leaves them out.
          lvis: read what only LVIS has: frequencies and lists of verified categories.
          report: gets what is repaired in it.

        Raises:
          UserError: names the annotation that lacks a field or has a wrong value.
        """
        self.path = path
        self.masks = None if masks is None else MaskSpool(masks)
        self._lvis = lvis
        self._report = report or Report()
        self.categories: dict[str, str] = {}
        self.frequencies: dict[str, str] = {}
        self._category_places: dict[str, int] = {}
        self.image_index: dict[str, int] = {}
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
            except UserError:
                raise
            except (TypeError, ValueError, OverflowError, AttributeError, struct.error) as error:
                raise UserError(
                    f"{path}: {key} number {counts[key]} has a wrong value ({error}): "
                    f"{_shown(value)}"
                ) from error

    @property
    def category_ids(self) -> list[str]:
        return list(self._category_places)

    def boxes(self) -> Float32[np.ndarray, "m 4"]:
        """Corners of the boxes as shares of their images; NaN for those of unlisted images.

        Those of images whose size is not told are in pixels.

        Raises:
          UserError: the numbers do not look like x, y, width and height in pixels.
        """
        sizes = np.array([*self.image_sizes, (np.nan, np.nan)], np.float32)[self.images()]
        box = np.array(self.xywh, np.float32).reshape(-1, 4)
        check_pixels(box, sizes, str(self.path), corners=False)
        box[:, 2:] += box[:, :2]
        box /= np.where(sizes == 0, 1, sizes)[:, [1, 0, 1, 0]]
        return box

    def images(self) -> Int32[np.ndarray, " m"]:
        """Position of each annotation's image, -1 = not listed."""
        return np.frombuffer(self.image, np.int32)

    def photo_sizes(self) -> Int32[np.ndarray, "m 2"]:
        """Height and width of each annotation's image in pixels, 0 where it is not listed."""
        return np.array([*self.image_sizes, (0, 0)], np.int32)[self.images()]

    def areas(self) -> np.ndarray:
        """(m) areas of the segments as shares of their images, NaN = missing; or as `boxes`."""
        pixels = np.array([*self.image_sizes, (np.nan, np.nan)], np.float64).prod(1)
        pixels[pixels == 0] = 1
        return np.frombuffer(self.area, np.float64) / pixels[self.images()]

    def _read_category(self, value: dict[str, Any]) -> None:
        number, name = text_id(value["id"]), value["name"]
        if not isinstance(name, str | int):
            raise ValueError(f"name {name!r:.40}, expected text")
        name = class_name(str(name))
        if not name:
            raise ValueError(f"name {value['name']!r:.40}, expected one that can be seen")
        if number in self.categories:
            if self.categories[number] != name:
                raise UserError(
                    f"{self.path}: category id {number} is {self.categories[number]!r} and {name!r}"
                )
            self._report.add("category given twice", REPAIRED, str(self.path), [number])
        self.categories[number] = name
        if self._lvis:
            frequency = value["frequency"]
            if frequency not in _FREQUENCIES:
                raise ValueError(f"frequency {frequency!r:.40}, expected 'r', 'c' or 'f'")
            self.frequencies[number] = frequency

    def _read_image(self, value: dict[str, Any]) -> None:
        number, index = text_id(value["id"]), len(self.image_files)
        if self._lvis and value.get("coco_url"):
            file = "/".join(str(value["coco_url"]).split("/")[-2:])
        else:
            # Some LVIS files (v1) have the address of the photo instead of its name.
            file = value.get("file_name") or value.get("coco_url") or value["file_name"]
        if not isinstance(file, str):
            raise ValueError(f"file_name {file!r:.40}, expected text")
        if number in self.image_index:
            if self.image_files[self.image_index[number]] != file:
                raise UserError(f"{self.path}: image id {number} is given twice")
            self._report.add("image given twice", REPAIRED, str(self.path), [number])
            return
        sides = [value.get(name) for name in ("height", "width")]
        height, width = (0 if side is None else whole(side) for side in sides)
        if min(height, width) < 0 or max(height, width) >= 1 << 31:
            raise UserError(
                f"{self.path}: image id {number} has width {width} and height {height}; expected "
                "pixels"
            )
        self.image_index[number] = index
        self.image_files.append(file)
        self.image_sizes.append((height, width) if height and width else (0, 0))
        if self._lvis:
            # Lists are missing in files of test sets.
            for key, confidence in _CONFIDENCES.items():
                for category in value.get(key) or ():
                    row = (index, self._place(category), confidence)
                    for column, item in zip(self.labels, row, strict=True):
                        column.append(item)

    def _read_annotation(self, value: dict[str, Any]) -> None:
        image = self.image_index.get(text_id(value["image_id"]), -1)
        place, number = self._place(value["category_id"]), value.get("id")
        row: int = number if _is_row(number) else len(self.row) + 1
        mask, box = None, value.get("bbox")
        size = self.image_sizes[image] if image >= 0 else (0, 0)
        if self.masks is not None:
            mask = self.masks.add(value.get("segmentation"), row, size)
        elif not box:
            mask, _ = clean_segmentation(value.get("segmentation"), size)
        if not box:  # missing, null or []
            box = [math.nan] * 4
            if mask is not None:
                box = box_of(mask)
                self._report.add("box made from the segmentation", REPAIRED, str(self.path), [row])
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {box!r:.80}, expected [x, y, width, height]")
        area = value.get("area")
        numbers = [math.nan if x is None else float(x) for x in (*box, area)]
        self.image.append(image)
        self.category.append(place)
        self.xywh.extend(numbers[:4])
        self.flags.append(
            (CROWD | GROUP_OF) * _is_set(value, "iscrowd") | DEPICTION * _is_set(value, "isfake")
        )
        self.area.append(numbers[4])
        self.row.append(row)

    def _place(self, category: Any) -> int:
        return self._category_places.setdefault(text_id(category), len(self._category_places))


def _is_set(value: dict[str, Any], field: str) -> bool:
    """Whether a field is 1; tools write 0, 1, truths, texts of them, or nothing."""
    found = value.get(field)
    text = "0" if found is None or found == "" else str(found).lower()
    if text not in ("0", "1", "0.0", "1.0", "false", "true"):
        raise ValueError(f"{field} {found!r:.40}, expected 0 or 1")
    return text in ("1", "1.0", "true")


def _is_row(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:150]
    except (RecursionError, ValueError):
        return f"{type(value).__name__} that is too deep or too long to show"
