"""Masks of OpenImages: references to PNG files, matched to boxes by image, class and coordinates.

Shape legend: P mask rows, M boxes.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from common.convert.annotations import Annotations
from common.convert.photos import walk
from common.convert.report import DROPPED, EXAMPLES, Report
from common.io.csv_columns import stream_csv
from common.tables.ranges import expand_ranges

_COORDINATES = ("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax")
# Largest difference of a coordinate: box and mask files round the same box to six decimals.
_SAME = 1e-4
_PAIRS = 200_000  # mask rows matched at once


def attach(
    annotations: Annotations,
    mask_files: list[Path],
    folder: Path,
    spool: Path,
    class_index: dict[str, int],
    report: Report,
) -> None:
    """Adds mask columns and the spool file to the annotations, if there are any PNG files.

    Args:
      annotations: boxes are matched in place.
      mask_files: CSV files with MaskPath, ImageID, LabelName and the box.
      folder: the PNGs lie somewhere below it.
      spool: file to write the references to.
      class_index: label -> class.
      report: gets masks without box or without PNG.
    """
    where = {os.path.basename(path): path for path in walk(folder) if path.lower().endswith(".png")}
    if not where:
        print(f"no mask PNGs below {folder}: masks are left out", flush=True)
        return
    num_boxes = len(annotations.boxes["image"])
    start, length = np.zeros(num_boxes, np.int64), np.zeros(num_boxes, np.int32)
    check = np.zeros(num_boxes, np.uint32)
    order = box_order(annotations)
    written = 0
    with open(spool, "wb") as out:
        for path in mask_files:
            for line, rows in mask_rows(path, annotations, order, class_index):
                names, match = rows.names, rows.match
                there = np.array([name in where for name in names], bool)
                gone = np.flatnonzero(~there)
                few = [names[i] for i in gone[:EXAMPLES]]
                report.add("mask file not found", DROPPED, str(path), gone + line, few)
                lost = np.flatnonzero(there & (match < 0))
                report.add("mask without a box", DROPPED, str(path), lost + line)
                for row in np.flatnonzero(there & (match >= 0)):
                    text = json.dumps({"png": where[names[row]]}, ensure_ascii=False).encode()
                    out.write(text)
                    start[match[row]], length[match[row]] = written, len(text)
                    check[match[row]] = zlib.crc32(text)
                    written += len(text)
    annotations.boxes |= {"mask_start": start, "mask_length": length, "mask_check": check}
    annotations.mask_spool = spool
    annotations.extra["mask_root"] = str(folder.absolute())


class MaskRows(NamedTuple):
    """Rows of a file of masks.

    Attributes:
      names: of the PNG files.
      image: index of the image, -1 when the annotations have none such.
      class_: of the mask, -2 when it is unknown.
      box: xmin, ymin, xmax, ymax.
      match: row of the box that the mask is of, -1 where there is none.
    """

    names: list[str]
    image: Int[np.ndarray, " P"]
    class_: Int[np.ndarray, " P"]
    box: Float[np.ndarray, "P 4"]
    match: Int[np.ndarray, " P"]


def box_order(annotations: Annotations) -> Int[np.ndarray, " M"]:
    """Rows of the boxes, image by image, for `mask_rows`."""
    return np.argsort(annotations.boxes["image"], kind="stable")


def mask_rows(
    path: Path, annotations: Annotations, order: Int[np.ndarray, " M"], class_index: dict[str, int]
) -> Iterator[tuple[int, MaskRows]]:
    """Line of the first row, and the rows, of one part of a file after the other."""
    types = {name: pa.string() for name in ("MaskPath", "ImageID", "LabelName")}
    types |= {name: pa.float32() for name in _COORDINATES}
    sorted_image = annotations.boxes["image"][order]
    for line, batch in stream_csv(path, types):
        yield line, _match(batch, annotations, order, sorted_image, class_index)


def _match(
    batch: pa.RecordBatch,
    annotations: Annotations,
    order: Int[np.ndarray, " M"],
    sorted_image: Int[np.ndarray, " M"],
    class_index: dict[str, int],
) -> MaskRows:
    table = annotations.boxes
    image = np.array([annotations.images.find(i) for i in batch["ImageID"].to_pylist()], np.int32)
    class_ = np.array([class_index.get(c, -2) for c in batch["LabelName"].to_pylist()], np.int32)
    box = np.stack([batch[c].to_numpy(zero_copy_only=False) for c in _COORDINATES], 1)
    box = box.astype(np.float32)
    result = np.full(len(image), -1, np.int64)
    for first in range(0, len(image), _PAIRS):
        part = slice(first, first + _PAIRS)
        result[part] = _nearest(image[part], class_[part], box[part], table, order, sorted_image)
    return MaskRows(batch["MaskPath"].to_pylist(), image, class_, box, result)


def _nearest(
    image: Int[np.ndarray, " P"],
    class_: Int[np.ndarray, " P"],
    box: Float[np.ndarray, "P 4"],
    table: dict[str, np.ndarray],
    order: Int[np.ndarray, " M"],
    sorted_image: Int[np.ndarray, " M"],
) -> Int[np.ndarray, " P"]:
    low = np.searchsorted(sorted_image, image, "left")
    counts = np.searchsorted(sorted_image, image, "right") - low
    mask, position = expand_ranges(low, counts)  # all pairs of a mask and a box of its image
    row = order[position]
    distance = np.abs(table["box"][row] - box[mask]).max(1)
    good = (table["class"][row] == class_[mask]) & (distance < _SAME)
    mask, row, distance = mask[good], row[good], distance[good]
    best = np.lexsort((row, distance, mask))
    first = np.unique(mask[best], return_index=True)
    result = np.full(len(image), -1, np.int64)
    result[first[0]] = row[best][first[1]]
    return result
