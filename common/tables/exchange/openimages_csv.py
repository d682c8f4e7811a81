"""CSV files of the OpenImages Challenge 2019.

Submission: one row an image, `ImageId,PredictionString` with `label score xmin ymin xmax ymax`
repeated, or `ImageID,ImageWidth,ImageHeight,PredictionString` with `label score mask` repeated.
Offline evaluator: one row a detection, `ImageID,LabelName,Score,XMin,XMax,YMin,YMax` or
`ImageID,ImageWidth,ImageHeight,LabelName,Score,Mask`.
A mask is base64(zlib(COCO compressed run lengths)).

Shape legend: n rows of a chunk.
"""

import base64
import binascii
import csv
import dataclasses
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.io.csv_columns import read_header, stream_csv
from common.io.errors import UserError
from common.masks import rle
from common.tables import Detections
from common.tables.exchange import text
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Rows

_TOKENS = {False: 6, True: 3}  # of one detection in a PredictionString, by masks
_HEADERS = {
    (False, False): "ImageId,PredictionString",
    (True, False): "ImageID,ImageWidth,ImageHeight,PredictionString",
    (False, True): "ImageID,LabelName,Score,XMin,XMax,YMin,YMax",
    (True, True): "ImageID,ImageWidth,ImageHeight,LabelName,Score,Mask",
}
_FLUSH = 1 << 16  # detections parsed at once


def write_openimages(
    outgoing: Outgoing,
    output: str | os.PathLike,
    *,
    offline: bool = False,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    digits: int | None = None,
) -> None:
    """Writes a table as CSV for the challenge server or its offline evaluator.

    Submissions list every covered image, with an empty string if it has no detections, and clip
    boxes to the photo (tables allow the rounding of a division beyond it).

    Args:
      outgoing: the rows; with masks when `outgoing.masks`.
      output: file to write, compressed when it ends in .gz.
      offline: one row a detection, for the offline evaluator; boxes stay as they are.
      sizes: height and width of photos, for those without a mask in the table; needed for masks in
        submissions only.
      digits: decimals of scores and coordinates; None writes the exact numbers.

    Raises:
      UserError: ids or labels that the format cannot hold, masks of several sizes in one photo, or
        a photo of unknown size; the text names it.
    """
    reader = outgoing.reader
    image_ids = list(reader.image_ids)
    for image_id in image_ids:
        _check_word(image_id, "image id", reader.path, ",")
    with text.open_lines(output) as file:
        file.write(f"{_HEADERS[outgoing.masks, offline]}\n".encode())
        if offline:
            for chunk in outgoing.chunks():
                text.write_texts(file, _offline_lines(chunk, image_ids, digits, reader.path))
            return
        every = np.arange(len(image_ids))
        listed = every if outgoing.selected is None else np.flatnonzero(outgoing.selected)
        begin = 0
        for chunk in outgoing.chunks():
            end = int(np.searchsorted(listed, chunk.image_index[-1], "right"))
            text.write_texts(file, _lines(chunk, listed[begin:end], sizes, digits, reader.path))
            begin = end
        rest = dataclasses.replace(_nothing(outgoing), image_ids=image_ids)
        for start in range(begin, len(listed), _FLUSH):
            part = listed[start : start + _FLUSH]
            text.write_texts(file, _lines(rest, part, sizes, digits, reader.path))


def _lines(
    chunk: Detections,
    images: np.ndarray,
    sizes: Mapping[str, tuple[int, int]] | None,
    digits: int | None,
    path: Path,
) -> pa.Array:
    """Submission lines of the given covered images, whose detections are all in the chunk."""
    offsets = np.searchsorted(chunk.image_index, np.append(images, len(chunk.image_ids)))
    for label in np.unique(chunk.label_index):
        _check_word(chunk.labels[label], "label", path, ' ,"')
    head = [text.pick(list(chunk.labels), chunk.label_index), " ", _score(chunk, digits), " "]
    ids = pa.array([chunk.image_ids[i] for i in images], pa.string())
    if chunk.masks is None:
        boxes = np.clip(chunk.boxes, 0, 1)
        columns = [text.numbers(boxes[:, i], digits) for i in range(4)]
        spaced = [piece for column in columns for piece in (column, " ")]
        tokens = text.join(*head, *spaced[:-1])
        middle = ","
    else:
        tokens = text.join(*head, _mask_texts(chunk.mask_columns()[0]))
        height_width = _image_sizes(chunk, images, offsets, sizes, path)
        width, height = (text.numbers(height_width[:, i]) for i in (1, 0))
        middle = text.join(",", width, ",", height, ",")
    return text.join(ids, middle, text.join_groups(tokens, offsets, " "), "\n")


def _offline_lines(
    chunk: Detections, image_ids: Sequence[str], digits: int | None, path: Path
) -> pa.Array:
    for label in np.unique(chunk.label_index):
        _check_word(chunk.labels[label], "label", path, ',"')
    ids = text.pick(list(image_ids), chunk.image_index)
    labels, score = text.pick(list(chunk.labels), chunk.label_index), _score(chunk, digits)
    if chunk.masks is None:
        order = (0, 2, 1, 3)  # XMin, XMax, YMin, YMax
        columns = [text.numbers(chunk.boxes[:, i], digits) for i in order]
        commas = [piece for column in columns for piece in (",", column)]
        return text.join(ids, ",", labels, ",", score, *commas, "\n")
    images, first = np.unique(chunk.image_index, return_index=True)
    _image_sizes(chunk, images, np.append(first, len(chunk)), None, path)
    width, height = (text.numbers(chunk.mask_columns()[1][:, i]) for i in (1, 0))
    masks = _mask_texts(chunk.mask_columns()[0])
    return text.join(ids, ",", width, ",", height, ",", labels, ",", score, ",", masks, "\n")


def _score(chunk: Detections, digits: int | None) -> pa.Array:
    return text.numbers(np.asarray(chunk.scores, np.float32), digits)


def _mask_texts(masks: Sequence[bytes]) -> pa.Array:
    return pa.array([base64.b64encode(zlib.compress(m, 9)).decode() for m in masks], pa.string())


def _image_sizes(
    chunk: Detections,
    images: np.ndarray,
    offsets: np.ndarray,
    sizes: Mapping[str, tuple[int, int]] | None,
    path: Path,
) -> np.ndarray:
    """Height and width of each image: of its masks, which must agree, else of the photo."""
    counts = np.diff(offsets)
    known, mask_sizes = counts > 0, chunk.mask_columns()[1]
    result = np.zeros((len(images), 2), np.int64)
    result[known] = mask_sizes[offsets[:-1][known]]
    rows = mask_sizes[offsets[0] : offsets[-1]]
    other = (rows != np.repeat(result, counts, axis=0)).any(1)
    if other.any():
        row = int(np.argmax(other)) + offsets[0]
        image = chunk.image_index[row]
        first = result[np.searchsorted(images, image)]
        raise UserError(
            f"{path}: image {chunk.image_ids[image]!r} has masks of {first[0]}x{first[1]} and of "
            f"{mask_sizes[row, 0]}x{mask_sizes[row, 1]} (height x width), expected one "
            "size"
        )
    for place in np.flatnonzero(~known):
        image_id = chunk.image_ids[images[place]]
        size = (sizes or {}).get(image_id, (0, 0))
        if min(size) <= 0:
            raise UserError(
                f"{path}: image {image_id!r} has no detections and its size is unknown; a "
                "submission with masks names it: give --dataset=DIR with photo sizes"
            )
        result[place] = size
    return result


def _check_word(word: str, what: str, path: Path, forbidden: str) -> None:
    if not word or any(c in word for c in forbidden) or any(c in word for c in '"\r\n'):
        raise UserError(
            f"{path}: {what} {word!r} cannot stand in this format, expected text without "
            "spaces, commas and quotes"
        )


def _nothing(outgoing: Outgoing) -> Detections:
    """No rows, with masks or not."""
    return Detections(
        image_ids=outgoing.reader.image_ids,
        labels=[],
        image_index=np.zeros(0, np.int32),
        label_index=np.zeros(0, np.int32),
        scores=np.zeros(0, np.float32),
        boxes=np.zeros((0, 4), np.float32),
        metadata={},
        masks=np.zeros(0, object) if outgoing.masks else None,
        mask_sizes=np.zeros((0, 2), np.int32) if outgoing.masks else None,
    )


def read_openimages(path: Path, *, masks: bool, cover: Callable[[str], None]) -> Iterator[Rows]:
    """Reads either form, told apart by the header.

    Args:
      path: CSV file, possibly .gz.
      masks: whether it holds masks; their boxes are the tight ones, as the evaluator makes them.
      cover: called with the id of every image of a submission, empty ones too.

    Raises:
      UserError: names file and line.
    """
    header = read_header(path)
    if "PredictionString" in header:
        return _read_submission(path, header, masks, cover)
    if "LabelName" in header:
        return _read_offline(path, masks)
    wanted = " or ".join(_HEADERS[masks, offline] for offline in (False, True))
    raise UserError(f"{path}: header {','.join(header)[:100]!r}, expected {wanted}")


def _read_offline(path: Path, masks: bool) -> Iterator[Rows]:
    names = _HEADERS[masks, True].split(",")
    kinds = {"Score": pa.float32(), "ImageWidth": pa.int32(), "ImageHeight": pa.int32()}
    texts = ("ImageID", "LabelName", "Mask")
    types = {n: pa.string() if n in texts else kinds.get(n, pa.float32()) for n in names}
    for line, batch in stream_csv(path, types):
        for name in names:
            if batch[name].null_count:
                at = batch[name].is_null().to_numpy(zero_copy_only=False).argmax()
                raise UserError(f"{path}: row {line + at}: {name} is empty")
        ids, labels = batch["ImageID"].dictionary_encode(), batch["LabelName"].dictionary_encode()
        rows = Rows(
            image_ids=ids.dictionary.to_pylist(),
            image_index=ids.indices.to_numpy(),
            labels=labels.dictionary.to_pylist(),
            label_index=labels.indices.to_numpy(),
            scores=batch["Score"].to_numpy(),
            boxes=np.zeros((len(batch), 4), np.float32),
            numbers=line + np.arange(len(batch)),
        )
        if masks:
            size = [batch[name].to_numpy() for name in ("ImageHeight", "ImageWidth")]
            yield _with_masks(rows, batch["Mask"].to_pylist(), np.stack(size, 1), path)
        else:
            corners = [batch[name].to_numpy() for name in ("XMin", "YMin", "XMax", "YMax")]
            yield dataclasses.replace(rows, boxes=np.stack(corners, 1))


def _unfolded(data: bytes, size: np.ndarray) -> bytes:
    """Counts of a mask, no longer than its frame can need."""
    limit = int(rle.max_text(size))
    stream = zlib.decompressobj()
    counts = stream.decompress(data, limit + 1)
    if len(counts) > limit:
        raise ValueError(f"more than {limit} characters for {size[0]}x{size[1]} pixels")
    if not stream.eof:
        raise ValueError("it is cut off")
    return counts


def _with_masks(rows: Rows, texts: list[str], sizes: np.ndarray, path: Path) -> Rows:
    """Adds decoded masks and their boxes."""
    masks = np.zeros(len(texts), object)
    for i, encoded in enumerate(texts):
        try:
            masks[i] = _unfolded(base64.b64decode(encoded, validate=True), sizes[i])
        except (binascii.Error, ValueError, zlib.error) as error:
            raise UserError(
                f"{path}: row {rows.numbers[i]}: mask {encoded[:20]!r} is no base64 of zlib "
                f"({error})"
            ) from error
    if (broken := rle.find_broken(masks.tolist(), sizes)) is not None:
        raise UserError(f"{path}: row {rows.numbers[broken[0]]}: {broken[1]}")
    height, width = np.asarray(sizes, np.float64).T
    boxes = rle.tight_boxes(masks.tolist(), sizes) / np.stack([width, height, width, height], 1)
    return dataclasses.replace(rows, masks=masks, mask_sizes=sizes, boxes=boxes.astype(np.float32))


def _read_submission(
    path: Path, header: list[str], masks: bool, cover: Callable[[str], None]
) -> Iterator[Rows]:
    names = {name.lower(): place for place, name in enumerate(header)}
    needed = _HEADERS[masks, False].lower().split(",")
    if missing := [name for name in needed if name not in names]:
        raise UserError(
            f"{path}: no column {missing[0]}; found {','.join(header)[:100]}, expected "
            f"{_HEADERS[masks, False]}"
        )
    width = _TOKENS[masks]
    csv.field_size_limit(sys.maxsize)  # one field holds all detections of a photo
    pending: list[tuple[str, int, list[str], tuple[str, str]]] = []
    size = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            next(lines)
            for row in lines:
                line = lines.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(f"{path}: row {line}: {len(row)} columns of {len(header)}")
                image_id = row[names["imageid"]]
                cover_at(cover, image_id, path, line)
                tokens = row[names["predictionstring"]].split()
                if len(tokens) % width:
                    raise UserError(
                        f"{path}: row {line}: image {image_id!r} has {len(tokens)} words in "
                        f"PredictionString, expected {width} for each detection"
                    )
                frame = (row[names["imageheight"]], row[names["imagewidth"]]) if masks else ("", "")
                pending.append((image_id, line, tokens, frame))
                size += len(tokens)
                if size >= _FLUSH * width:
                    yield _parse(path, pending, masks)
                    pending, size = [], 0
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read it ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except csv.Error as error:
        raise UserError(f"{path}: row {lines.line_num}: {error}") from error
    if pending:
        yield _parse(path, pending, masks)


def cover_at(cover: Callable[[str], None], image_id: str, path: Path, line: int) -> None:
    try:
        cover(image_id)
    except UserError as error:
        raise UserError(f"{path}: row {line}: {error}") from error


def _parse(path: Path, pending: list, masks: bool) -> Rows:
    """Detections of complete rows of a submission."""
    width = _TOKENS[masks]
    counts = np.array([len(tokens) // width for _, _, tokens, _ in pending])
    words = [word for _, _, tokens, _ in pending for word in tokens]
    owner = np.repeat(np.arange(len(pending)), counts)
    lines = np.array([line for _, line, _, _ in pending])[owner]
    labels = pa.array(words[::width], pa.string()).dictionary_encode()
    rows = Rows(
        image_ids=[image_id for image_id, _, _, _ in pending],
        image_index=owner,
        labels=labels.dictionary.to_pylist(),
        label_index=labels.indices.to_numpy(),
        scores=_floats(words[1::width], "score", path, lines),
        boxes=np.zeros((len(owner), 4), np.float32),
        numbers=lines,
    )
    if not masks:
        columns = [_floats(words[i::width], "coordinate", path, lines) for i in range(2, 6)]
        return dataclasses.replace(rows, boxes=np.stack(columns, 1))
    frames = []
    for image_id, line, _, frame in pending:
        if not all(side.isascii() and side.isdecimal() and len(side) < 10 for side in frame):
            raise UserError(
                f"{path}: row {line}: image {image_id!r} has ImageHeight {frame[0]!r} and "
                f"ImageWidth {frame[1]!r}, expected pixels"
            )
        frames.append([int(side) for side in frame])
    sizes = np.array(frames, np.int64).reshape(-1, 2)[owner]
    return _with_masks(rows, words[2::width], sizes, path)


def _floats(words: list[str], what: str, path: Path, lines: np.ndarray) -> np.ndarray:
    try:
        return pa.array(words, pa.string()).cast(pa.float32()).to_numpy()
    except pa.ArrowInvalid:
        for word, line in zip(words, lines, strict=True):
            try:
                pa.array([word]).cast(pa.float32())
            except pa.ArrowInvalid as error:
                raise UserError(f"{path}: row {line}: {what} {word!r} is no number") from error
        raise
