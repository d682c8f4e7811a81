"""Results in COCO and LVIS form: a JSON list of one object a detection.

`{"image_id": 139, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}` in pixels, or
`"segmentation": {"size": [height, width], "counts": "..."}` for masks. Official tools measure the
area of a result by its box as soon as the first result has one, so results for mask AP carry
no box: `geometry` 'masks' leaves it out.

Shape legend: n rows of a chunk.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.io.errors import UserError
from common.io.json_file import whole
from common.io.json_stream import stream_list
from common.masks import rle
from common.tables import Detections
from common.tables.exchange import text
from common.tables.exchange.ids import Categories, Images, find_id, id_texts, image_columns
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Rows
from common.tables.table import COORDINATE_SLACK

LVIS_MAX_PER_IMAGE = 300
GEOMETRIES = ("boxes", "masks", "both")
_FLUSH = 1 << 16  # detections checked at once


def write_results(
    outgoing: Outgoing,
    output: str | os.PathLike,
    images: Images,
    categories: Categories,
    *,
    geometry: str = "boxes",
    digits: int | None = None,
) -> None:
    """Writes a table as results.

    Args:
      outgoing: the rows, with masks when the geometry has them.
      output: JSON file to write, compressed when it ends in .gz.
      images: numbers and sizes of the images.
      categories: numbers of the labels.
      geometry: one of GEOMETRIES.
      digits: decimals of scores and pixels; None writes what reads back as the table's numbers.

    Raises:
      UserError: an image or label without a number, or an image of unknown size.
    """
    reader = outgoing.reader
    needed = np.ones(len(reader.image_ids), bool)
    if outgoing.selected is not None:
        needed = outgoing.selected
    numbers, sizes = image_columns(images, reader.image_ids, needed, pixels=geometry != "masks")
    with text.open_lines(output) as file:
        file.write(b"[\n")
        first = True
        for chunk in outgoing.chunks():
            if not first:
                file.write(b",\n")
            first = False
            rows = _objects(chunk, numbers, sizes, categories, geometry, digits, reader.path)
            text.write_texts(file, rows, ",\n")
        file.write(b"\n]\n")


def _objects(
    chunk: Detections,
    numbers: list[str],
    sizes: np.ndarray,
    categories: Categories,
    geometry: str,
    digits: int | None,
    path: Path,
) -> pa.Array:
    category = [""] * len(chunk.labels)
    for label in np.unique(chunk.label_index).tolist():
        name = chunk.labels[label]
        if name not in categories.numbers:
            raise UserError(f"{categories.source}: no category {name!r}, which {path} has")
        category[label] = json.dumps(categories.numbers[name])
    pieces = ['{"image_id":', text.pick(numbers, chunk.image_index)]
    pieces += [',"category_id":', text.pick(category, chunk.label_index)]
    if geometry != "masks":
        scale = sizes[chunk.image_index][:, [1, 0]].astype(np.float64)
        corners = chunk.boxes.astype(np.float64)
        xywh = np.concatenate(
            [corners[:, :2] * scale, (corners[:, 2:] - corners[:, :2]) * scale], axis=1
        )
        columns = [text.numbers(xywh[:, i], digits) for i in range(4)]
        pieces += [',"bbox":[', columns[0]]
        for column in columns[1:]:
            pieces += [",", column]
        pieces += ["]"]
    if geometry != "boxes":
        # The characters of run lengths contain no quote, but the backslash.
        masks, sizes = chunk.mask_columns()
        counts = pa.array([mask.decode("ascii") for mask in masks], pa.string())
        counts = pc.replace_substring(counts, "\\", "\\\\")
        height, width = (text.numbers(sizes[:, i]) for i in range(2))
        pieces += [',"segmentation":{"size":[', height, ",", width, '],"counts":"', counts, '"}']
    pieces += [',"score":', text.numbers(np.asarray(chunk.scores, np.float32), digits), "}"]
    return text.join(*pieces)


def read_results(
    path: Path, images: Images, categories: Categories, *, masks: bool
) -> Iterator[Rows]:
    """Reads results; rows are numbered from 1.

    A result without a box gets the tight one of its mask. Boxes that leave the photo by up to a
    pixel, as rounding makes them, are cut.

    Args:
      path: JSON file, possibly .gz.
      images: numbers and sizes of the images.
      categories: numbers of the labels.
      masks: whether to keep masks; every result must have one then.

    Raises:
      UserError: no results, a missing field, an unknown image or category, a mask that is none.
    """
    image_ids, labels = list(images.numbers), list(categories.numbers)
    image_texts, label_texts = id_texts(images.numbers), id_texts(categories.numbers)
    image_codes = {image_id: i for i, image_id in enumerate(image_ids)}
    label_codes = {label: i for i, label in enumerate(labels)}
    sizes = np.array([images.sizes.get(i, (0, 0)) for i in image_ids], np.int64).reshape(-1, 2)
    pending: list[tuple] = []
    number = 0
    for number, result in enumerate(stream_list(path), start=1):
        try:
            image = image_codes.get(find_id(image_texts, result["image_id"]), -1)
            label = label_codes.get(find_id(label_texts, result["category_id"]), -1)
            if image < 0 or label < 0:
                key, source = (
                    ("image_id", images.source) if image < 0 else ("category_id", categories.source)
                )
                raise UserError(
                    f"{path}: row {number}: {key} {result[key]!r:.80} is not in {source}"
                )
            box = result.get("bbox")
            if box is not None and len(box) != 4:
                raise ValueError(f"bbox {box!r}, expected [x, y, width, height]")
            mask = _compressed(result.get("segmentation")) if masks or box is None else None
            if box is None and mask is None:
                raise KeyError("bbox")
            if masks and mask is None:
                raise KeyError("segmentation")
            box = (np.nan,) * 4 if box is None else tuple(map(float, box))
            pending.append((number, image, label, float(result["score"]), box, mask))
        except KeyError as error:
            keys = ", ".join(result)[:80]
            raise UserError(f"{path}: row {number}: no field {error}; found {keys}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: row {number}: {error}: {_shown(result)}") from error
        if len(pending) == _FLUSH:
            yield _rows(path, pending, image_ids, labels, sizes, images.source, masks)
            pending = []
    if pending:
        yield _rows(path, pending, image_ids, labels, sizes, images.source, masks)


def _compressed(mask: Mapping[str, Any] | None) -> tuple[bytes, int, int] | None:
    """Counts, height and width of a run-length mask."""
    if mask is None:
        return None
    if not isinstance(mask, Mapping):
        raise ValueError("segmentation is no run-length code (polygons are for ground truth)")
    height, width = map(whole, mask["size"])
    if not 0 < min(height, width) <= max(height, width) < 1 << 31:
        raise ValueError(f"segmentation of size {height}x{width}")
    counts = mask["counts"]
    if isinstance(counts, list):
        counts = rle.encode_runs(counts)
    return (counts.encode("latin-1") if isinstance(counts, str) else counts, height, width)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:120]
    except RecursionError:
        return "an object that is nested too deep"


def _rows(
    path: Path,
    pending: list[tuple],
    image_ids: list[str],
    labels: list[str],
    sizes: np.ndarray,
    source: str,
    masks: bool,
) -> Rows:
    columns = list(zip(*pending, strict=True))
    segments = columns.pop()
    numbers, image, label, scores, xywh = map(np.array, columns)
    xywh, frame = xywh.astype(np.float64), sizes[image].astype(np.float64)
    coded = np.array([segment is not None for segment in segments], bool)
    counts = np.array([s[0] for s in segments if s is not None] + [None], object)[:-1]
    mask_sizes = np.array([s[1:] for s in segments if s is not None], np.int64).reshape(-1, 2)
    if (broken := rle.find_broken(counts.tolist(), mask_sizes)) is not None:
        raise UserError(f"{path}: row {numbers[coded][broken[0]]}: {broken[1]}")
    if (negative := (xywh[:, 2:] < 0).any(1)).any():
        at = int(np.argmax(negative))
        raise UserError(
            f"{path}: row {numbers[at]}: bbox {xywh[at].tolist()}, expected x, y, width, height"
        )
    corners = xywh.copy()
    corners[:, 2:] += xywh[:, :2]
    boxed = np.isfinite(xywh).any(1) | ~coded
    if (unknown := boxed & ~frame.all(1)).any():
        at = int(np.argmax(unknown))
        raise UserError(
            f"{source}: size of image {image_ids[image[at]]!r} is unknown, boxes in pixels need it"
        )
    from_mask = ~boxed[coded]
    corners[~boxed] = rle.tight_boxes(counts[from_mask].tolist(), mask_sizes[from_mask])
    frame[~boxed] = mask_sizes[from_mask]
    scale = frame[:, [1, 0, 1, 0]]
    boxes = corners / scale
    beyond = np.maximum(-corners, corners - scale)
    rounding = (beyond <= 1) & (beyond > COORDINATE_SLACK * scale)
    boxes = np.where(rounding, np.clip(boxes, 0, 1), boxes).astype(np.float32)
    rows = Rows(
        image_ids=image_ids,
        image_index=image,
        labels=labels,
        label_index=label,
        scores=scores.astype(np.float32),
        boxes=boxes,
        numbers=numbers,
    )
    if not masks:
        return rows
    return Rows(**{**vars(rows), "masks": counts, "mask_sizes": mask_sizes})
